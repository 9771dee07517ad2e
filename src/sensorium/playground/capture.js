// Camera and microphone. Browsers offer them only to pages from this machine or over https.

import {byId} from "./dom.js";
import {openDialog} from "./dialogs.js";
import {say} from "./i18n.js";
import {toWav} from "./wav.js";

export const canCapture = () => Boolean(navigator.mediaDevices?.getUserMedia && window.MediaRecorder);

const stamp = () => new Date().toTimeString().slice(0, 8).replaceAll(":", "");
const end = (stream) => stream.getTracks().forEach((track) => track.stop());

/** Collects what a stream gives until `stop`, which resolves to a blob. */
function recorder(stream, type) {
  const pieces = [];
  const found = new MediaRecorder(stream, MediaRecorder.isTypeSupported(type) ? {mimeType: type} : {});
  const done = new Promise((resolve) => { found.onstop = () => resolve(new Blob(pieces, {type: found.mimeType})); });
  found.ondataavailable = ({data}) => pieces.push(data);
  found.start();
  return {stop: () => { if (found.state !== "inactive") found.stop(); return done; }};
}

/** The file of what a stream shows in a time, as far as the browser records such a type. */
export async function record(stream, durationMs) {
  const running = recorder(stream, "video/webm;codecs=vp8");
  await new Promise((resolve) => setTimeout(resolve, durationMs));
  return running.stop();
}

export const videoFile = (blob, name = `video-${stamp()}`) =>
  new File([blob], `${name}.${blob.type.includes("mp4") ? "mp4" : "webm"}`, {type: blob.type.split(";")[0]});

/** A recording from the microphone: `stop` resolves to a WAV file. */
export async function startMicrophone() {
  const stream = await navigator.mediaDevices.getUserMedia({audio: true});
  const running = recorder(stream, "audio/webm;codecs=opus");
  return {async stop() {
    const blob = await running.stop();
    end(stream);
    return new File([await toWav(blob)], `recording-${stamp()}.wav`, {type: "audio/wav"});
  }};
}

/** An image or a video from the camera, or null. */
export async function fromCamera({images, videos}) {
  const stream = await navigator.mediaDevices.getUserMedia({video: {width: {ideal: 1280}}});
  const view = byId("camera-view");
  const videoButton = byId("camera-video");
  byId("camera-take").hidden = !images;
  videoButton.hidden = !videos;
  say(videoButton, "camera.video");
  view.srcObject = stream;
  let running = null;
  let video = null;
  const onVideo = async () => {
    if (running === null) {
      running = recorder(stream, "video/webm;codecs=vp8");
      say(videoButton, "camera.video.stop");
      videoButton.setAttribute("aria-pressed", "true");
    } else {
      video = videoFile(await running.stop());
      byId("camera-dialog").close();
    }
  };
  videoButton.addEventListener("click", onVideo);
  try {
    return await openDialog(byId("camera-dialog"), () => photograph(view)) ?? video;
  } finally {
    videoButton.removeEventListener("click", onVideo);
    videoButton.setAttribute("aria-pressed", "false");
    end(stream);
    view.srcObject = null;
  }
}

async function photograph(view) {
  const canvas = new OffscreenCanvas(view.videoWidth || 640, view.videoHeight || 480);
  canvas.getContext("2d").drawImage(view, 0, 0, canvas.width, canvas.height);
  const blob = await canvas.convertToBlob({type: "image/jpeg", quality: 0.92});
  return new File([blob], `photo-${stamp()}.jpg`, {type: blob.type});
}
