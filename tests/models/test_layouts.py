# SPDX-License-Identifier: Apache-2.0
"""CLIP of open_clip and transformers in StopModel's towers: the features of the library, or a refusal."""

import json
import sys

import pytest
import torch
from stoptome_kernels.stop import StopConfig, StopModel, checkpoint
from stoptome_kernels.tome.config import ToMeConfig
from stoptome_kernels.video.blocks import VideoTokens, run_stack

LIBRARIES = ("open_clip", "open_clip with text.", "transformers")
ACTIVATIONS = ("quick_gelu", "gelu")
# of StopModel, so that its text tower is CLIP's
PLAIN = {"frames": 2, "lora": False, "text_prompts": 0, "temporal_prompt": "DGL"}
VISION = {"layers": 2, "width": 128, "patch_size": 16, "image_size": 48}
TEXT = {"context_length": 16, "vocab_size": 60, "width": 64, "heads": 1, "layers": 3}


def library(name: str, activation: str, **text):
    """A model with random weights, none of which is 0 or 1 everywhere."""
    from harness import libraries  # noqa: F401  (first of all that may import torchvision)

    torch.manual_seed(0)
    if name == "transformers":
        from transformers import CLIPConfig, CLIPModel

        of_text = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3, "intermediate_size": 256,
                   "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 59, "bos_token_id": 58,
                   "hidden_act": activation, **text}  # fmt: skip
        of_vision = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 512,
                     "image_size": 48, "patch_size": 16, "hidden_act": activation}  # fmt: skip
        model = CLIPModel(CLIPConfig(text_config=of_text, vision_config=of_vision, projection_dim=24))
    else:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

        kind = CustomTextCLIP if "text." in name else CLIP
        model = kind(24, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT | text), quick_gelu=activation == "quick_gelu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def settings(activation: str, **changes) -> dict:
    """An open_clip_config.json."""
    cfg = {"embed_dim": 24, "vision_cfg": dict(VISION), "text_cfg": dict(TEXT)}
    if activation == "quick_gelu":
        cfg["quick_gelu"] = True
    for name, value in changes.items():
        part, _, of = name.partition("__")
        cfg[part][of] = value
    return {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073]}}


def saved(folder, model, activation: str, suffix: str):
    """A file of weights as the library writes it, with its settings next to it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        if suffix == ".bin":
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
            return folder / "pytorch_model.bin"
        return folder / "model.safetensors"
    (folder / "open_clip_config.json").write_text(json.dumps(settings(activation)))
    if suffix == ".bin":
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
        return folder / "open_clip_pytorch_model.bin"
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


def texts() -> torch.Tensor:
    ids = torch.randint(1, 58, (3, 16), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((15, 4, 9)):
        ids[row, end] = 59
        ids[row, end + 1 :] = 0
    return ids


def images() -> torch.Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))


def their_features(model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        if hasattr(model, "get_text_features"):
            found = model.get_text_features(texts()), model.get_image_features(images())
            return tuple(part if isinstance(part, torch.Tensor) else part.pooler_output for part in found)
        return model.encode_text(texts()), model.encode_image(images())


def our_features(model: StopModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the text tower as it is called, and of the visual tower's parts without STOP's prompts: each image an item."""
    c, visual = model.config, model.visual
    schedule = ToMeConfig().schedule(c.layers, 1 + c.patches, 1, 1, c.width)
    with torch.no_grad():
        stream, _ = run_stack(visual.transformer.resblocks, VideoTokens(visual._embed(images())), schedule)
        return model.encode_text(texts()), visual.ln_post(stream.x[:, 0]) @ visual.proj


@pytest.mark.slow  # imports the libraries
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_features_are_those_of_the_library(tmp_path, name, activation, suffix):
    """Whose settings tell the activation; the other one gives other features."""
    model = library(name, activation)
    path = saved(tmp_path / "clip", model, activation, suffix)
    want = their_features(model)
    for given in (path, tmp_path / "clip"):
        ours = StopModel.from_checkpoint(given, **PLAIN)
        assert ours.config.activation == activation
        assert ours.loaded.left_over == ()
        for got, right in zip(our_features(ours), want, strict=True):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)
    (other,) = {*ACTIVATIONS} - {activation}
    with pytest.raises(ValueError, match=f"say activation='{activation}', not '{other}'"):
        StopModel.from_checkpoint(path, **PLAIN, activation=other)
    for file in (tmp_path / "clip").glob("*.json"):
        file.unlink()
    with pytest.raises(ValueError, match="give activation='quick_gelu' or activation='gelu'"):
        StopModel.from_checkpoint(path, **PLAIN)
    ours = StopModel.from_checkpoint(path, **PLAIN, activation=other)
    for got, right in zip(our_features(ours), want, strict=True):
        assert (got - right).abs().max() > 1e-3
    # weights in memory
    fresh = StopModel(checkpoint.infer_config(model.state_dict(), **PLAIN, activation=activation))
    with pytest.raises(ValueError, match="give activation='quick_gelu' or activation='gelu'"):
        fresh.load_clip(model.state_dict())
    with pytest.raises(ValueError, match=f"for StopConfig[(]activation='{other}'"):
        fresh.load_clip(model.state_dict(), activation=other)
    fresh.load_clip(model.state_dict(), activation=activation)
    assert not any(p.requires_grad for n, p in fresh.named_parameters() if "resblocks" in n and "Prompt" not in n)
    for got, right in zip(our_features(fresh), want, strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vision_cfg__head_width": 32}, "head_width is 32"),
        ({"vision_cfg__pool_type": "avg"}, "pool_type is 'avg'"),
        ({"vision_cfg__norm_kwargs": {"eps": 1e-6}}, "norm_kwargs is"),
        ({"vision_cfg__act_kwargs": {"approximate": "tanh"}}, "act_kwargs is"),
        ({"text_cfg__no_causal_mask": True}, "no_causal_mask is True"),
        ({"text_cfg__pool_type": "last"}, "pool_type is 'last'"),
        ({"text_cfg__hf_tokenizer_name": "bert"}, "hf_tokenizer_name is 'bert'"),
    ],
)
def test_settings_of_open_clip_that_can_not_be_computed(tmp_path, changes, says):
    path = saved(tmp_path, library("open_clip", "gelu"), "gelu", ".bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings("gelu", **changes)))
    with pytest.raises(ValueError, match=f"open_clip_config.json next to the weights: {says}"):
        StopModel.from_checkpoint(path, **PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(model_type="siglip"), "model_type is 'siglip'"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act is 'gelu', 'quick_gelu'"),
        (lambda c: c.update(text_config_dict={"hidden_act": "gelu"}), "hidden_act is 'gelu', 'quick_gelu'"),
        (
            lambda c: [c[of].update(hidden_act="relu") for of in ("text_config", "vision_config")],
            "hidden_act is 'relu'",
        ),
        (lambda c: c["vision_config"].update(layer_norm_eps=1e-6), "layer_norm_eps is 1e-06"),
        (lambda c: c["vision_config"].update(num_attention_heads=4), "num_attention_heads is 4 at width 128"),
        (lambda c: c["text_config"].update(eos_token_id=7), "eos_token_id is 7"),
        (lambda c: c.update(text_config=5), ""),
    ],
)
def test_settings_of_transformers_that_can_not_be_computed(tmp_path, change, says):
    path = saved(tmp_path, library("transformers", "quick_gelu"), "quick_gelu", ".bin")
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json next to the weights: {says}"):
        StopModel.from_checkpoint(path, **PLAIN)


@pytest.mark.slow
def test_other_heads_of_the_text_tower(tmp_path):
    """Settings tell their number, which weights don't."""
    model = library("transformers", "gelu", num_attention_heads=2)
    ours = StopModel.from_checkpoint(saved(tmp_path, model, "gelu", ".safetensors"), **PLAIN)
    assert ours.config.text_heads == 2
    torch.testing.assert_close(our_features(ours)[0], their_features(model)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_images_that_were_normalised_in_another_way(tmp_path):
    path = saved(tmp_path, library("open_clip", "gelu"), "gelu", ".bin")
    other = settings("gelu")
    other["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"images were normalised by \[0.5, 0.5, 0.5\]"):
        StopModel.from_checkpoint(path, **PLAIN)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings("gelu")))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"as preprocessor_config.json says"):
        StopModel.from_checkpoint(path, **PLAIN)


@pytest.mark.slow
def test_settings_that_contradict_each_other_or_are_damaged(tmp_path):
    path = saved(tmp_path, library("transformers", "quick_gelu"), "quick_gelu", ".bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings("gelu")))
    with pytest.raises(ValueError, match="contradict each other"):
        StopModel.from_checkpoint(path, **PLAIN)
    for damaged in ("{", "[]", "[" * 100_000, "\0"):
        (tmp_path / "open_clip_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"open_clip_config\.json, next to the weights, "):
            StopModel.from_checkpoint(path, **PLAIN)


# -- without the libraries --------------------------------------------------------------------------------------------


def small(**changes) -> StopModel:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "embed_dim": 32, "text_width": 64,
             "text_heads": 1, "text_layers": 2, "vocab_size": 60, "frames": 4, "temporal_prompt": "DGL"}  # fmt: skip
    return StopModel(StopConfig(**sizes | changes)).eval()


def plain(model: StopModel) -> dict[str, torch.Tensor]:
    """CLIP's own part of a model's weights."""
    return {k: v for k, v in model.state_dict().items() if not any(part in k for part in ("LoRA", "rompt", "gelu"))}


def test_a_checkpoint_of_gelu_is_known_again(tmp_path):
    """A file of a StopModel tells its activation, and goes into no model of the other."""
    gelu, quick = small(activation="gelu"), small()
    video = torch.randn(1, 4, 3, 32, 32)
    torch.save({f"clip.{name}": value for name, value in gelu.state_dict().items()}, tmp_path / "a.pt")
    again = StopModel.from_checkpoint(tmp_path / "a.pt")
    assert again.config.activation == "gelu"
    assert again.loaded == ((), ())
    with torch.no_grad():
        assert torch.equal(again.encode_video(video), gelu.encode_video(video))
        assert (quick.encode_video(video) - gelu.encode_video(video)).abs().max() > 1e-5
    for strict in (False, True):
        with pytest.raises(ValueError, match="activation='gelu'"):
            quick.load_state_dict(gelu.state_dict(), strict=strict)
    with pytest.raises(ValueError, match=r"for StopConfig[(]activation='gelu'"):
        quick.load_clip(gelu.state_dict())
    with pytest.raises(ValueError, match=r"for StopConfig[(]activation='quick_gelu'"):
        gelu.load_clip(quick.state_dict())
    with pytest.raises(ValueError, match=r"activation='quick_gelu' was given, .* activation='gelu'"):
        StopModel.from_checkpoint(tmp_path / "a.pt", activation="quick_gelu")
    assert small().load_clip(quick.state_dict()) == ((), ())
    assert small().state_dict().keys() == gelu.state_dict().keys() - {"uses_gelu"}


def test_names_that_openai_and_open_clip_share(tmp_path):
    """Its archive's three numbers tell OpenAI's weights; without them either may have saved these."""
    numbers = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(plain(small()) | numbers, tmp_path / "openai.pt")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # not theirs, and not read
    assert StopModel.from_checkpoint(tmp_path / "openai.pt").config.activation == "quick_gelu"
    with pytest.raises(ValueError, match="activation='gelu' was given"):
        StopModel.from_checkpoint(tmp_path / "openai.pt", activation="gelu")
    (tmp_path / "config.json").unlink()
    torch.save(plain(small()), tmp_path / "either.pt")
    with pytest.raises(checkpoint.ActivationUnknown):
        checkpoint.infer_config(checkpoint.read_state_dict(tmp_path / "either.pt"))
    for activation in ACTIVATIONS:
        model = StopModel.from_checkpoint(tmp_path / "either.pt", activation=activation)
        assert model.config.activation == activation


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"visual.ln_pre.weight": None}, r"key 'visual\.ln_pre\.weight' is missing"),
        (
            {"transformer.resblocks.1.mlp.c_fc.bias": None},
            r"key 'transformer\.resblocks\.1\.mlp\.c_fc\.bias' is missing",
        ),
        ({"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(64)}, r"ls_1\.gamma' is none of CLIP's"),
        ({"text.cls_emb": torch.ones(64)}, r"'text\.cls_emb' is none of CLIP's"),
    ],
)
def test_towers_of_another_form(tmp_path, change, says):
    state = {name: value for name, value in (plain(small()) | change).items() if value is not None}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says):
        StopModel.from_checkpoint(tmp_path / "a.pt", activation="gelu")


def test_widths_whose_heads_have_other_sizes():
    """open_clip's ViT-H, g and bigG, whose names and shapes would fit."""
    with torch.device("meta"):
        state = plain(small(width=1280))
    with pytest.raises(ValueError, match="width is 1280, and CLIP's heads are of 64 channels only up to ViT-L"):
        checkpoint.infer_config(state, activation="gelu")
    with torch.device("meta"):
        state = plain(small(text_width=96, text_heads=2))
    with pytest.raises(ValueError, match=r"give text_heads=…"):
        checkpoint.infer_config(state, activation="gelu")
    assert checkpoint.infer_config(state, activation="gelu", text_heads=2).text_heads == 2


def test_checkpoints_in_parts(tmp_path):
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text('{"weight_map": {}}')
        for path in (folder, folder / name):
            with pytest.raises(ValueError, match=r"it lists the parts of a sharded checkpoint.*max_shard_size"):
                StopModel.from_checkpoint(path)


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "a.safetensors"
    safetensors.save_file(plain(small()), path)
    assert StopModel.from_checkpoint(path, activation="gelu").loaded.left_over == ()
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=f"^{path} can't be read as weights"):
        StopModel.from_checkpoint(path, activation="gelu")
    path.write_bytes(data)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=f"^{path} is a file of safetensors, .* pip install safetensors"):
        StopModel.from_checkpoint(path, activation="gelu")
