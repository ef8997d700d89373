"""The options that commands share, one decorator a group, which hands the command one object with their values; and
`--config`, which sets any of them from a file."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxcli.cli.streams import be_quiet
from fluxcli.cli.types import BatchSize, Device, Finite, Gpus, InputFile, Local, Lora, Model, Numbers, Side, Whole
from fluxcli.core import config

if TYPE_CHECKING:
    from fluxcli.job.input.read import Format

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FILE = Local(dir_okay=False, path_type=Path)
INPUT = InputFile()


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["fluxcli.verbose"] = True


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        be_quiet()


class _Defaulted(click.Option):
    """An environment variable's value is a default: --config goes before it."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        return None if self.name in (ctx.default_map or {}) else super().resolve_envvar_value(ctx)


def choice(*values: str) -> click.Choice[str]:
    return click.Choice(values, case_sensitive=False)


@dataclass(frozen=True)
class Machine:
    """What runs, and where."""

    model: str | None
    revision: str | None
    dtype: str
    device: str
    compile: bool | None
    attention: str
    quantization: str
    transformer: Path | None
    vae: Path | None
    text_encoder: Path | None
    text_encoder_2: Path | None

    @property
    def files(self) -> dict[str, Path]:
        """Single files, by the parts whose weights they hold."""
        parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
        return {part: getattr(self, part) for part in parts if getattr(self, part) is not None}


@dataclass(frozen=True)
class Input:
    """How INPUT is read."""

    input_format: "Format | None"
    prompt_column: str | None
    id_column: str | None


@dataclass(frozen=True)
class Rows:
    """What a row gets where it says nothing; None is the model's own."""

    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    seed: int
    lora: tuple[tuple[str, float], ...] = ()
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0


@dataclass(frozen=True)
class Files:
    """How images are written."""

    format: str
    quality: int


@dataclass(frozen=True)
class Processes:
    """Where a job runs; this process where none is given."""

    gpus: str | int | list[int] | None
    workers: int | None
    ray: str | None


def _group(name: str, kind: type[Any], *options: Decorator) -> Decorator:
    """Options whose values the command gets as one `kind`, under `name`."""
    own = [field.name for field in fields(kind)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def grouped(*args: Any, **given: Any) -> Any:
            given[name] = kind(**{each: given.pop(each) for each in own})
            return command(*args, **given)

        decorated: Callable[..., Any] = grouped
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def _without(options: Decorator, **settled: Any) -> Decorator:
    """A group less the options that would do nothing, whose values are `settled`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        grouped = options(command)

        @wraps(grouped)
        def fewer(*args: Any, **given: Any) -> Any:
            return grouped(*args, **given, **settled)

        decorated: Any = fewer
        decorated.__click_params__ = [each for each in decorated.__click_params__ if each.name not in settled]
        return fewer

    return decorate


def verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    flag = partial(click.option, is_flag=True, expose_value=False)
    command = flag("-v", "--verbose", callback=_verbose, help="Show tracebacks of errors.")(command)
    return flag("-q", "--quiet", callback=_quiet, help="Tell errors only: no progress, no summary.")(command)


TEXT_LENGTHS = Numbers("text lengths", config.MAX_TEXT_LENGTH)
device_option = click.option(
    "--device", type=Device(), default="auto", show_default=True, help="Where it runs. auto: a GPU, if there is one."
)
machine_options = _group(
    "machine",
    Machine,
    click.option(
        "-m",
        "--model",
        cls=_Defaulted,
        type=Model(),
        envvar="FLUXCLI_MODEL",
        show_envvar=True,
        help="Hub id, pipeline directory, single file, tiny, or random:flux-dev.  [default: FLUX.1-dev on a GPU, else "
        "tiny]",
    ),
    click.option("--transformer", type=FILE, help="Single file with the denoiser, in place of the model's own."),
    click.option("--vae", type=FILE, help="Single file with the VAE."),
    click.option("--text-encoder", type=FILE, help="Single file with CLIP."),
    click.option("--text-encoder-2", type=FILE, help="Single file with T5."),
    click.option("--revision", help="Branch, tag or commit of a model from the hub."),
    click.option(
        "--dtype",
        type=choice("auto", *config.DTYPES),
        default="auto",
        show_default=True,
        help="Of weights and activations. auto: bfloat16 on a GPU, float32 on a CPU.",
    ),
    device_option,
    click.option(
        "--compile/--no-compile",
        default=None,
        help="Prepare each shape: captured graphs on a GPU, torch.compile on a CPU.  [default: on a GPU]",
    ),
    click.option(
        "--attention",
        type=choice("auto", *config.ATTENTION),
        default="auto",
        show_default=True,
        help="The library for it. auto: the fastest for each shape, measured once.",
    ),
    click.option(
        "--quantization",
        type=choice(*config.QUANTIZATION),
        default="none",
        show_default=True,
        help="fp8: the large matmuls in 8-bit floating point. Faster and half the memory; images differ a little.",
    ),
)
text_lengths_option = click.option(
    "--text-lengths",
    type=TEXT_LENGTHS,
    default=config.TEXT_LENGTHS,
    help="Buckets of prompt length in T5 tokens; one number fixes it (512 is the reference).  "
    "[default: 64,128,256,512]",
)
input_options = _group(
    "reading",
    Input,
    click.option(
        "--input-format",
        type=choice("jsonl", "txt", "csv", "tsv"),
        help="Of INPUT; jsonl may also be one JSON array.  [default: its suffix says; jsonl on standard input]",
    ),
    click.option("--prompt-column", metavar="NAME", help="The column or key that is the prompt.  [default: prompt]"),
    click.option("--id-column", metavar="NAME", help="The column or key that is the id.  [default: id]"),
)
row_options = _group(
    "rows",
    Rows,
    click.option("--width", type=Side(), help="Image width.  [default: the model's]"),
    click.option("--height", type=Side(), help="Image height.  [default: the model's]"),
    click.option(
        "--steps",
        type=Whole(1, config.MAX_STEPS),
        metavar="N",
        help="Denoising steps of an image.  [default: the model's]",
    ),
    click.option("--guidance", type=Finite(), help="Guidance scale.  [default: 3.5 where the model takes one]"),
    click.option(
        "--seed",
        type=Whole(0, 2**64 - 1),
        default=0,
        show_default=True,
        metavar="N",
        help="The first image's in gen, where seeds count up. In a job a row without a seed gets one from this and its "
        "id.",
    ),
    click.option(
        "--lora",
        type=Lora(),
        multiple=True,
        help="An adapter, a .safetensors file, for every image whose row names none. May be given several times.",
    ),
    click.option("--negative-prompt", metavar="TEXT", help="Of an image whose row has none; with --true-cfg-scale."),
    click.option(
        "--true-cfg-scale",
        type=Finite(),
        default=1.0,
        show_default=True,
        help="Above 1, true guidance away from the negative prompt, which may be empty: twice the denoiser's work. For "
        "models that are not distilled.",
    ),
)
shape_options = _without(row_options, guidance=None, seed=0)
format_options = _group(
    "files",
    Files,
    click.option(
        "--format", type=choice(*config.FORMATS), default="png", show_default=True, help="Of the image files."
    ),
    click.option("--quality", type=Whole(1, 100), metavar="N", default=95, show_default=True, help="Of JPEG and WebP."),
)
step_cache_option = click.option(
    "--step-cache",
    metavar="off|fine|balanced|fast|FILE:PRESET|MASK",
    default="off",
    show_default=True,
    help="Reuse what the blocks added in some steps: about 1.6, 2.1 or 2.8 times faster, for other pixels. FILE: a "
    "model's own, by fluxcli calibrate. MASK: a 1 for each step that is evaluated, a 0 for each other.",
)
process_options = _group(
    "processes",
    Processes,
    click.option(
        "--gpus",
        type=Gpus(),
        help="Run on several GPUs of this machine, a worker process each: all of them, the first N, or those named.  "
        "[default: one, in this process]",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1, config.MOST_WORKERS),
        metavar="N",
        help="On a CPU, run in N worker processes.  [default: in this process] With --ray, on N of the cluster.  "
        "[default: one on each of its GPUs]",
    ),
    click.option(
        "--ray",
        metavar="HOST:PORT|auto|local",
        help="Run on a Ray cluster: that of this head, the one that this machine is part of, or a new one of this "
        "machine alone.",
    ),
)
batch_size_option = click.option(
    "--batch-size",
    type=BatchSize(),
    default=config.BATCH_SIZE,
    show_default=True,
    help="auto: for each size the largest power of two up to 16 that memory holds.",
)
json_output = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def _read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    import tomllib

    try:
        with open(path, "rb") as file:
            given = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}", ctx, param) from error
    known = {name.lstrip("-"): option for option in ctx.command.params for name in option.opts if name[:2] == "--"}
    defaults: dict[str, Any] = {}
    for key, value in given.items():
        option = known.get(key.replace("_", "-"))
        if option is None or option.name in (None, "config"):
            raise click.BadParameter(f"{path}: there is no option {key!r}", ctx, param)
        # click would round and guess: 1.9 is no seed, and true no size.
        whole = isinstance(option.type, click.IntRange | Side | BatchSize) and str(value).lower() != "auto"
        flag = isinstance(option, click.Option) and option.is_flag
        if (whole and type(value) is not int) or (flag and type(value) is not bool):
            wanted = "an integer" if whole else "true or false"
            raise click.BadParameter(f"{path}: {key} must be {wanted}, got {value!r}", ctx, param)
        several = isinstance(option, click.Option) and option.multiple and not isinstance(value, list)
        defaults[str(option.name)] = (value,) if several else tuple(value) if isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
