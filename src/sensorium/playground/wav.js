// Audio as 16-bit mono WAV, the form that every server reads.

const RATE = 16_000;

/** Whatever the browser can play, as samples at 16 kHz in a WAV file. */
export async function toWav(blob) {
  // A context of that rate resamples while it decodes.
  const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
  const mono = new Float32Array(decoded.length);
  for (let channel = 0; channel < decoded.numberOfChannels; channel++) {
    const samples = decoded.getChannelData(channel);
    for (let at = 0; at < mono.length; at++) mono[at] += samples[at] / decoded.numberOfChannels;
  }
  return encodeWav(mono, RATE);
}

export function encodeWav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((letter, place) => view.setUint8(at + place, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);  // PCM
  view.setUint16(22, 1, true);  // channels
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);  // bytes a second
  view.setUint16(32, 2, true);  // bytes a frame
  view.setUint16(34, 16, true);  // bits a sample
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, at) => view.setInt16(44 + 2 * at, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new Blob([view.buffer], {type: "audio/wav"});
}
