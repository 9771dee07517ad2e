"""Audio towers against transformers' classes, on clips of odd lengths, alone and together."""

import pytest
import torch
from torch import Tensor, nn
from transformers import WhisperConfig as HFWhisperConfig
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder as HFWhisperEncoder

from sensorium.models.layers import Linear
from sensorium.models.towers.whisper import OmniAudioTower, WhisperConfig, WhisperTower

SHAPE = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 50,
}


def take(tower: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a tower the oracle's weights; every parameter must be there."""
    for path, module in tower.named_modules():
        own = {name: state.pop(f"{path}.{name}") for name, _ in module.named_parameters(recurse=False)}
        if isinstance(module, Linear):
            module.pack(own["weight"], own.get("bias"))
        else:
            for name, value in own.items():
                setattr(module, name, nn.Parameter(value, requires_grad=False))


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@torch.inference_mode()
def test_published_whisper() -> None:
    oracle = randomized(HFWhisperEncoder(HFWhisperConfig(**SHAPE)))
    with torch.device("meta"):
        tower = WhisperTower(WhisperConfig.of(SHAPE))
    state = dict(oracle.state_dict())
    take(tower, state)
    assert not state
    clips = [torch.randn(16, 100), torch.randn(16, 100)]
    for clip, states in zip(clips, tower(clips), strict=True):
        torch.testing.assert_close(states, oracle(clip.unsqueeze(0)).last_hidden_state[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("frames", [[3], [20], [21], [39, 100, 4], [20, 41, 80]])
def test_omni_audio(frames: list[int]) -> None:
    config = Qwen2_5OmniAudioEncoderConfig(**SHAPE, n_window=10, output_dim=24)
    oracle = randomized(Qwen2_5OmniAudioEncoder(config))
    with torch.device("meta"):
        tower = OmniAudioTower({**SHAPE, "n_window": 10, "output_dim": 24})
    state = dict(oracle.state_dict())
    take(tower, state)
    assert set(state) == {"audio_bos_eos_token.weight"}
    clips = [torch.randn(16, n) for n in frames]
    expected = oracle(torch.cat(clips, 1), feature_lens=torch.tensor(frames)).last_hidden_state
    found = tower(clips)
    assert [len(x) for x in found] == [((n - 1) // 2 + 1 - 2) // 2 + 1 for n in frames]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-4)
