"""Directories that are no model fluxcli runs: each is refused before anything is loaded, in one line that names the
file and the cause. The cases are those that people meet, and those that somebody could make."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fluxcli.core.errors import ModelError
from fluxcli.models.checkpoints import resolve
from tests.models.conftest import WEIGHTS, edit, rewrite, shard

TRANSFORMER = f"transformer/{WEIGHTS['transformer']}"
Change = Callable[[Path], Any]


def index(**changes: Any) -> Change:
    return lambda model: edit(model / "model_index.json", **changes)


def config(part: str, **changes: Any) -> Change:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return lambda model: edit(model / part / name, **changes)


def bytes_in(file: str, data: bytes) -> Change:
    return lambda model: (model / file).write_bytes(data)


def renamed(old: str, new: str) -> Change:
    return lambda model: (model / old).rename(model / new)


def tensors(part: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    return lambda model: rewrite(model / part / WEIGHTS[part], change)


def float8(scales: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        matrices = {name: tensor for name, tensor in given.items() if tensor.ndim == 2}
        stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in matrices.items()}
        return given | stored | {name.removesuffix("weight") + scales: torch.ones(1) for name in matrices}

    return change


def header_length(length: int) -> Change:
    def change(model: Path) -> None:
        path = model / TRANSFORMER
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    return change


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    def harm(model: Path) -> None:
        path = model / TRANSFORMER
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        given = json.loads(data[8 : 8 + length])
        change(given)
        head = json.dumps(given).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])

    return harm


def first_offsets(offsets: Any) -> Change:
    return header(
        lambda given: next(each for name, each in given.items() if name != "__metadata__").update(data_offsets=offsets)
    )


def fifo(file: str) -> Change:
    def change(model: Path) -> None:
        (model / file).unlink()
        os.mkfifo(model / file)

    return change


def link(file: str, to: str) -> Change:
    def change(model: Path) -> None:
        (model / file).unlink(missing_ok=True)
        (model / file).symlink_to(to)

    return change


def both(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def sharded(change: Callable[[Path], Any]) -> Change:
    """`change` of the index of a transformer in shards."""
    return lambda model: change(shard(model / TRANSFORMER))


DEEP = b"[" * 100_000 + b"]" * 100_000
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 9983040304\n"

CASES: dict[str, tuple[Change, str]] = {
    # Other pipelines.
    "Fill": (
        index(_class_name="FluxFillPipeline"),
        r"model_index.json: fluxcli runs FluxPipeline, this is FluxFillPipeline$",
    ),
    "a pipeline that brings its code": (index(_class_name=["pipeline", "Flex2Pipeline"]), r"this is Flex2Pipeline$"),
    "no class": (index(_class_name=...), r"this is None$"),
    "a modular pipeline": (renamed("model_index.json", "modular_model_index.json"), r"but modular_model_index.json"),
    "control characters": (index(_class_name="\x1b]0;x\x07"), r"this is \\x1b\]0;x\\x07$"),
    "Chroma's transformer": (
        config("transformer", approximator_layers=5),
        r"fluxcli does not know approximator_layers",
    ),
    "Fill's transformer": (
        config("transformer", in_channels=384, out_channels=64),
        r"takes 384 channels and makes 64: FLUX\.1 Fill, a control model or their like",
    ),
    "channels of text": (config("transformer", in_channels="384"), r"in_channels must be like 64, got 384"),
    "patches of four": (config("transformer", patch_size=2), r"patch_size must be 1, got 2"),
    "axes of another head": (
        config("transformer", axes_dims_rope=[16, 56, 55]),
        r"\[16, 56, 55\] must add up to attention_head_dim",
    ),
    # Parts that are not there.
    "a null part": (index(text_encoder_2=[None, None]), r"model_index.json: has no text_encoder_2"),
    "a part left out": (index(vae=...), r"has no vae"),
    "a null tokenizer": (index(tokenizer=[None, None]), r"has no tokenizer"),
    # Classes that are none of the table.
    "nunchaku": (
        index(transformer=["nunchaku", "NunchakuFluxTransformer2dModel"]),
        r"NunchakuFluxTransformer2dModel \(quantised weights\)",
    ),
    "another model": (
        index(text_encoder=["transformers", "Trainer"]),
        r"text_encoder is transformers.Trainer; of transformers fluxcli takes CLIPTextModel",
    ),
    "a module": (index(tokenizer=["transformers", "utils"]), r"tokenizer is transformers.utils"),
    "a list for a name": (index(tokenizer=["transformers", ["x"]]), r"tokenizer is transformers"),
    "another library": (index(vae=["os", "system"]), r"vae is os.system"),
    "a name alone": (index(vae="AutoencoderKL"), r"vae is None.AutoencoderKL"),
    # Quantised weights, in every part and before anything is loaded.
    **{
        f"bitsandbytes, {part}": (
            config(part, quantization_config=BNB),
            rf"{part}/config.json: the weights are quantised \(bitsandbytes nf4\)",
        )
        for part in WEIGHTS
    },
    "int8": (
        config("text_encoder_2", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"bitsandbytes int8",
    ),
    "torchao in a pickle": (
        both(
            config("transformer", quantization_config={"quant_method": "torchao", "quant_type": "int8wo"}),
            renamed(TRANSFORMER, "transformer/diffusion_pytorch_model.bin"),
        ),
        r"quantised \(torchao int8wo\)",
    ),
    "mlx": (
        config("text_encoder_2", quantization={"group_size": 64, "bits": 4}),
        r"text_encoder_2/config.json: the weights are quantised",
    ),
    "quanto": (bytes_in("transformer/quantization_map.json", b"{}"), r"quantised \(optimum-quanto\)"),
    "nf4 without a word in the config": (
        tensors("transformer", lambda given: given | {"proj_out.weight.absmax": torch.zeros(3)}),
        r"holds proj_out.weight.absmax: the weights are quantised",
    ),
    "quanto's tensors": (
        tensors("text_encoder_2", lambda given: given | {"a._data": torch.zeros(3), "a._scale": torch.zeros(3)}),
        r"holds a._",
    ),
    # Files that are not what their names say.
    "a git-lfs pointer": (
        bytes_in(TRANSFORMER, POINTER),
        r"is a git-lfs pointer, not the file itself; run `git lfs pull`",
    ),
    "a git-lfs pointer for a vocabulary": (
        bytes_in("tokenizer_2/tokenizer.json", POINTER),
        r"tokenizer.json: is a git-lfs pointer",
    ),
    "a web page": (
        bytes_in("vae/" + WEIGHTS["vae"], b"<!doctype html><html>Access is restricted</html>"),
        r"vae/.*: it is a web page",
    ),
    "a web page for a config": (bytes_in("vae/config.json", b"<html></html>"), r"vae/config.json: .*web page"),
    "an empty file": (bytes_in(TRANSFORMER, b""), r"0 bytes are no safetensors file; download it again"),
    "a pickle": (bytes_in(TRANSFORMER, b"PK\x03\x04" + bytes(200)), r"it is a pickle under another name"),
    "a GGUF": (bytes_in(TRANSFORMER, b"GGUF\x03\0\0\0" + bytes(200)), r"it is a GGUF file under another name"),
    "a broken download": (
        lambda model: os.truncate(model / TRANSFORMER, 2_000_000),
        r"bytes of weights; the download broke off",
    ),
    "a download broken in the header": (lambda model: os.truncate(model / TRANSFORMER, 100), r"ends within its header"),
    "a link to nothing": (link(TRANSFORMER, "../../blobs/gone"), r"a link to a file that is gone"),
    "a vocabulary linked to nothing": (
        link("tokenizer_2/tokenizer.json", "../../blobs/gone"),
        r"tokenizer.json: a link to a file that is gone",
    ),
    # Weights that are there, and not as they are read.
    "a pickle only": (
        renamed(TRANSFORMER, "transformer/diffusion_pytorch_model.bin"),
        r"diffusion_pytorch_model.bin is not read: such files can run code",
    ),
    "a pickle only, T5": (
        renamed("text_encoder_2/model.safetensors", "text_encoder_2/pytorch_model.bin"),
        r"text_encoder_2: .*pytorch_model.bin is not read",
    ),
    "a GGUF only": (
        renamed(TRANSFORMER, "transformer/flux1-dev-Q8_0.gguf"),
        r"flux1-dev-Q8_0.gguf is read where it is given by name",
    ),
    "another name": (
        renamed(TRANSFORMER, "transformer/flux.safetensors"),
        r"has neither .*; there is flux.safetensors",
    ),
    "two variants": (
        both(
            lambda model: (model / "transformer/diffusion_pytorch_model.bf16.safetensors").write_bytes(b""),
            renamed(TRANSFORMER, "transformer/diffusion_pytorch_model.fp16.safetensors"),
        ),
        r"in the variants bf16, fp16, and none without; keep one",
    ),
    "shards without an index": (sharded(lambda index: index.unlink()), r"has shards without their index"),
    "a shard missing": (
        sharded(lambda index: next(index.parent.glob("*00002*")).unlink()),
        r"00002-of-00003.safetensors named in .*index.json but not there",
    ),
    "some shards missing beside a single file": (
        both(sharded(lambda index: next(index.parent.glob("*00002*")).unlink()), bytes_in(TRANSFORMER, b"")),
        r"but not there; remove diffusion_pytorch_model.safetensors.index.json to read",
    ),
    "an index of nothing": (sharded(lambda index: index.write_text("{}")), r"has no weight_map"),
    "an index that reaches out": (
        sharded(lambda index: index.write_text('{"weight_map": {"a": "../../other.safetensors"}}')),
        r"names ../../other.safetensors, which is no",
    ),
    "an index of another place": (
        sharded(lambda index: index.write_text('{"weight_map": {"a": "/etc/x.safetensors"}}')),
        r"names /etc/x.safetensors, which is no",
    ),
    "an index of a pickle": (
        sharded(lambda index: index.write_text('{"weight_map": {"a": "a.bin"}}')),
        r"names a.bin, which is no",
    ),
    "an index of a number": (
        sharded(lambda index: index.write_text('{"weight_map": {"a": 7}}')),
        r"names 7, which is no",
    ),
    # Configs that nothing can be built of.
    "null axes": (
        config("transformer", axes_dims_rope=None),
        r"axes_dims_rope must be a list of whole numbers, got None",
    ),
    "a text for a number": (config("transformer", num_layers="2"), r"num_layers must be like 19, got 2"),
    "another theta": (config("transformer", theta=500), r"theta must be 10000"),
    "no layers at all": (config("transformer", num_layers=-1), r"num_layers is -1"),
    "10^9 layers": (config("transformer", num_layers=10**9), r"num_layers is 1000000000; fluxcli builds at most 1000"),
    "10^7 layers of T5": (
        config("text_encoder_2", num_layers=10**7),
        r"text_encoder_2/config.json: num_layers is 10000000",
    ),
    "10^12 words": (config("text_encoder_2", vocab_size=10**12), r"vocab_size is 1000000000000"),
    "10^9 blocks": (config("vae", layers_per_block=10**9), r"layers_per_block is 1000000000"),
    "a thousand stages": (config("vae", block_out_channels=[32] * 1000), r"block_out_channels has 1000 items"),
    "deep JSON": (
        bytes_in("transformer/config.json", DEEP),
        r"transformer/config.json: cannot be read: nested too deeply",
    ),
    "a deep index": (bytes_in("model_index.json", DEEP), r"model_index.json: cannot be read: nested too deeply"),
    "huge JSON": (
        lambda model: os.truncate(model / "vae/config.json", 2**35),
        r"vae/config.json: has 34,359,738,368 bytes; fluxcli reads at most",
    ),
    "not UTF-8": (bytes_in("vae/config.json", b"\xff\xfe{}"), r"vae/config.json: "),
    "a FIFO for a config": (fifo("transformer/config.json"), r"transformer/config.json: is no regular file"),
    "a FIFO for weights": (fifo(TRANSFORMER), r"is no regular file"),
    "a FIFO for a vocabulary": (fifo("tokenizer_2/tokenizer.json"), r"is no regular file"),
    "a device for a config": (link("vae/config.json", "/dev/zero"), r"vae/config.json: is no regular file"),
    "a directory for a config": (
        both(lambda model: (model / "vae/config.json").unlink(), lambda model: (model / "vae/config.json").mkdir()),
        r"vae/config.json: ",
    ),
    "defaults of no size": (bytes_in("fluxcli.json", b'{"width": "x"}'), r"fluxcli.json: width cannot be x"),
    "defaults too large": (bytes_in("fluxcli.json", b'{"height": 1000000}'), r"fluxcli.json: height cannot be 1000000"),
    "defaults of endless steps": (
        bytes_in("fluxcli.json", b'{"num_inference_steps": 1e400}'),
        r"num_inference_steps cannot be inf",
    ),
    # Weight files that lie.
    "a header of 2^62 bytes": (
        header_length(2**62),
        r"a header of 4,611,686,018,427,387,904 bytes is not that of a safetensors file",
    ),
    "a header of 20 GB": (header_length(20 * 2**30), r"a header of 21,474,836,480 bytes"),
    "no header": (header_length(0), r"cannot be read: Expecting value"),
    "offsets beyond the end": (first_offsets([0, 2**62]), r"the download broke off"),
    "offsets below nothing": (first_offsets([-8, 0]), r"its header says nothing sensible of"),
    "offsets of another kind": (first_offsets("x"), r"its header says nothing sensible of"),
    # Schedulers.
    "Heun by the index": (
        index(scheduler=["diffusers", "FlowMatchHeunDiscreteScheduler"]),
        r"scheduler is diffusers.FlowMatchHeunDiscreteScheduler",
    ),
    "DPM++ by its config": (
        config("scheduler", _class_name="DPMSolverMultistepScheduler"),
        r"samples with FlowMatchEulerDiscreteScheduler, this is DPM",
    ),
    "null shifts": (
        config("scheduler", base_shift=None, use_dynamic_shifting=True),
        r"scheduler_config.json: base_shift must be a number, got None",
    ),
    "no length between the ends": (
        config("scheduler", base_image_seq_len=4096, max_image_seq_len=4096, use_dynamic_shifting=True),
        r"must differ",
    ),
    "no shift": (config("scheduler", shift=0), r"shift must be above 0"),
    "noise at each step": (config("scheduler", stochastic_sampling=True), r"stochastic_sampling adds noise"),
    "two kinds of sigmas": (
        config("scheduler", use_karras_sigmas=True, use_exponential_sigmas=True),
        r"only one kind of sigmas",
    ),
    "10^9 training steps": (config("scheduler", num_train_timesteps=10**9), r"num_train_timesteps must be 1 to"),
    "a text for a shift": (config("scheduler", shift="3"), r"shift must be a number, got 3"),
    "a file of another name": (
        renamed("scheduler/scheduler_config.json", "scheduler/config.json"),
        r"scheduler_config.json: missing from the model",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_run_is_refused_in_a_line(model: Path, case: str) -> None:
    change, message = CASES[case]
    change(model)
    with pytest.raises(ModelError, match=message) as refused:
        resolve(str(model))
    assert len(str(refused.value).splitlines()) == 1
    assert str(refused.value).isprintable()


def test_beta_sigmas_need_scipy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(model / "scheduler/scheduler_config.json", use_beta_sigmas=True)
    monkeypatch.setattr("fluxcli.models.configs.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"scheduler_config\.json: use_beta_sigmas needs scipy: pip install scipy"):
        resolve(str(model))


def nothing(model: Path) -> None:
    pass


HARMLESS: dict[str, Change] = {
    "as it is": nothing,
    "parts that FluxPipeline may have": index(
        feature_extractor=[None, None], image_encoder=[None, None], weights={"custom": "x"}
    ),
    "keys that say how weights were stored": config(
        "transformer", dtype="bfloat16", torch_dtype="bfloat16", theta=10_000, _name_or_path="x"
    ),
    "keys left out that have defaults": config("transformer", in_channels=..., patch_size=..., out_channels=...),
    "no class in the scheduler's config": config("scheduler", _class_name=...),
    "keys that the scheduler does not know": config("scheduler", foo=1, invert_sigmas=None),
    "null ends of a shift that is not used": config(
        "scheduler", base_shift=None, max_shift=None, use_dynamic_shifting=False
    ),
    "files that nobody reads": both(
        *(
            bytes_in(file, b"x")
            for file in (
                "transformer/diffusion_pytorch_model.bin",
                "text_encoder_2/pytorch_model.bin",
                "vae/README.md",
                "flux1-dev.safetensors",
                "transformer/._diffusion_pytorch_model.safetensors",
                "transformer/diffusion_pytorch_model.fp16.safetensors",
            )
        )
    ),
    "a FIFO that nobody reads": lambda model: os.mkfifo(model / "vae" / "pipe"),
    "30 GB that nobody reads": lambda model: (
        (model / "text_encoder" / "flax_model.msgpack").open("wb").truncate(30 * 2**30)
    ),
    "a device that nobody reads": lambda model: (model / "vae" / "zero.json").symlink_to("/dev/zero"),
    "shards": sharded(lambda index: None),
    "an index left behind by a single file": lambda model: (
        model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    ).write_text('{"weight_map": {"a": "gone.safetensors"}}'),
    "a single variant": renamed(TRANSFORMER, "transformer/diffusion_pytorch_model.bf16.safetensors"),
    "scaled float8": tensors("transformer", float8("weight_scale")),
    "scaled float8, another spelling": tensors("text_encoder_2", float8("scale_weight")),
    "float8 without scales": tensors(
        "transformer", lambda given: {name: each.to(torch.float8_e4m3fn) for name, each in given.items()}
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_can_be_run_is_taken(model: Path, case: str) -> None:
    HARMLESS[case](model)
    checkpoint = resolve(str(model))
    checkpoint.fingerprint()
    assert checkpoint.transformer["in_channels"] == 64


def test_a_missing_tensor_of_a_shard_is_named(model: Path) -> None:
    index = shard(model / TRANSFORMER)
    first = sorted(index.parent.glob("*.safetensors"))[0]
    name = sorted(load_file(first))[0]
    rewrite(first, lambda given: {key: value for key, value in given.items() if key != name})
    with pytest.raises(ModelError, match=rf"{first.name}: missing \(the index places it there\): {name}"):
        resolve(str(model))
