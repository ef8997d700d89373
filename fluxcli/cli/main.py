"""The command line: options in, exit code out. Thin: each command gathers settings and hands them to `fluxcli.job` and
`fluxcli.engine`, which are imported only then, so that --help answers at once."""

import contextlib
import json
import math
import os
import sys
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxcli import __version__
from fluxcli.core import config
from fluxcli.core.errors import FluxcliError, Remark, UsageError

if TYPE_CHECKING:
    from fluxcli.core.records import ShapeKey
    from fluxcli.job.plan import BatchSize
    from fluxcli.models.checkpoints import Checkpoint

_FORMATS = ("png", "jpg", "webp")
_MOST_IMAGES = 1024  # in a batch
_JOB_OPTIONS = ("text_lengths", "batch_size", "limit", "strict", "max_failures", "retry_failed")


class _Cli(click.Group):
    """Turns every error into a line or two on stderr and an exit code; -v shows the traceback too."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            say(error.format_message())
            sys.exit(error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "fluxcli"
            sys.exit(_tell(f"{error.format_message()} (see {path} --help)", error.exit_code))
        except click.ClickException as error:
            sys.exit(_tell(error.format_message(), error.exit_code))
        except click.Abort:
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        warnings.simplefilter("ignore")  # the libraries' remarks to their own users
        warnings.simplefilter("once", Remark)
        warnings.showwarning = lambda message, *where: say(f"Warning: {message}")
        if os.environ.get("NO_COLOR"):
            ctx.color = False
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, KeyboardInterrupt):
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nobody is told
            ctx.exit(1)
        except Exception as error:
            if ctx.meta.get("fluxcli.verbose"):
                traceback.print_exc()
            if isinstance(error, FluxcliError):
                ctx.exit(_tell(str(error), error.exit_code))
            ctx.exit(_tell(f"{type(error).__name__}: {error} (-v shows where)", 1))


def _tell(message: str, exit_code: int) -> int:
    say(f"Error: {message}")
    return exit_code


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A list like 64,128: each number once, in order."""

    name = "N,N,..."

    def __init__(self, what: str, most: int) -> None:
        self._what, self._most = what, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            numbers = sorted({int(str(part).strip()) for part in parts})
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 64,128,256,512", param, ctx)
        if not numbers or numbers[0] < 1 or numbers[-1] > self._most:
            self.fail(f"{self._what} must be 1 to {self._most}, got {value}", param, ctx)
        return tuple(numbers)


class _Side(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "PIXELS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            side = int(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number of pixels", param, ctx)
        if side % 16 or not 64 <= side <= 4096:
            self.fail(f"must be a multiple of 16 from 64 to 4096, got {side}", param, ctx)
        return side


class _Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, x, height = str(value).lower().partition("x")
        if not x:
            self.fail(f"{value!r} is not a size like 1024x768", param, ctx)
        return _Side().convert(width, param, ctx), _Side().convert(height, param, ctx)


class _Device(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "auto|cuda|cuda:N|cpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, index = str(value).partition(":")
        if kind not in ("auto", "cuda", "cpu") or (colon and (kind != "cuda" or not index.isdecimal())):
            self.fail(f"{value!r} is none of auto, cuda, cuda:N and cpu", param, ctx)
        return str(value)


class _BatchSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        size = int(value) if str(value).isdecimal() else 0
        if not 1 <= size <= _MOST_IMAGES:
            self.fail(f"{value!r} is neither 1 to {_MOST_IMAGES} nor auto", param, ctx)
        return size


class _Finite(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


_FILE = click.Path(dir_okay=False, path_type=Path)


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["fluxcli.verbose"] = True


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_verbosity = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_verbose, help="Show tracebacks of errors."
)
_TEXT_LENGTHS = _Numbers("text lengths", config.MAX_TEXT_LENGTH)
_machine_options = _options(
    click.option("-m", "--model", metavar="MODEL", help="Hub id, pipeline directory, tiny, or random:flux-dev."),
    click.option("--revision", help="Branch, tag or commit of a model from the hub."),
    click.option("--dtype", type=click.Choice(("auto", *config.DTYPES)), default="auto", show_default=True),
    click.option("--device", type=_Device(), default="auto", show_default=True),
    click.option(
        "--compile/--no-compile",
        default=None,
        help="Prepare each shape: captured graphs on a GPU, torch.compile on a CPU.  [default: on a GPU]",
    ),
    click.option("--attention", type=click.Choice(("auto", *config.ATTENTION)), default="auto", show_default=True),
)
_engine_options = _options(
    _machine_options,
    click.option(
        "--text-lengths",
        type=_TEXT_LENGTHS,
        default=config.TEXT_LENGTHS,
        help="Buckets of prompt length in T5 tokens; one number fixes it (512 is the reference).  "
        "[default: 64,128,256,512]",
    ),
)
_row_options = _options(
    click.option("--width", type=_Side(), help="Where a row has none.  [default: the model's]"),
    click.option("--height", type=_Side(), help="Where a row has none.  [default: the model's]"),
    click.option("--steps", type=click.IntRange(1, 1000), help="Denoising steps.  [default: the model's]"),
    click.option("--guidance", type=_Finite(), help="Guidance scale.  [default: 3.5 where the model takes one]"),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True),
)
_format_options = _options(
    click.option("--format", type=click.Choice(_FORMATS), default="png", show_default=True),
    click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of JPEG and WebP."),
)
_batch_size = click.option(
    "--batch-size",
    type=_BatchSize(),
    default=config.BATCH_SIZE,
    show_default=True,
    help="auto: for each size what memory holds and speed gains from, measured once.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def _read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    if path is None:
        return
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
        whole = isinstance(option.type, click.IntRange | _Side | _BatchSize) and value != "auto"
        flag = isinstance(option, click.Option) and option.is_flag
        if (whole and type(value) is not int) or (flag and type(value) is not bool):
            wanted = "an integer" if whole else "true or false"
            raise click.BadParameter(f"{path}: {key} must be {wanted}, got {value!r}", ctx, param)
        defaults[str(option.name)] = tuple(value) if isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fluxcli")
@_verbosity
def cli() -> None:
    """Prompts in, FLUX.1 images and timing manifests out: fast, resumable, and never losing one."""


@cli.command()
@click.argument("prompt")
@click.option(
    "-n", "--num-images", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Seeds count up."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Directory, or one file's name: its suffix is the format.",
)
@_row_options
@_format_options
@_batch_size
@_engine_options
@_json
@_verbosity
def gen(
    prompt: str,
    num_images: int,
    output: Path,
    format: str,
    quality: int,
    batch_size: int | str,
    as_json: bool,
    **options: Any,
) -> None:
    """Make images of one PROMPT and print their paths."""
    from fluxcli.core.errors import RowError
    from fluxcli.job import single
    from fluxcli.job.input.read import check_row
    from fluxcli.job.output.store import record_settings
    from fluxcli.job.plan import bucket, size_of
    from fluxcli.models.tokenizers import Tokenizers

    checkpoint, engine_config, defaults = _settings(options)
    image = config.ImageFormat(single.check_output(output, num_images) or format, quality)
    try:
        row = {"prompt": prompt, "seed": options["seed"], "num_images": num_images}
        records = check_row(row, 0, 1, defaults)
    except RowError as error:
        raise UsageError(str(error)) from error
    tokens = Tokenizers(checkpoint.tokenizers).count([prompt])[0]
    text_length = bucket(tokens, options["text_lengths"])
    if tokens > text_length:
        say(f"the prompt has {tokens} tokens and is cut to {text_length}")
    records = [replace(record, text_tokens=tokens, text_length=text_length) for record in records]
    size = size_of(_batch_sizes(batch_size, checkpoint, engine_config), records[0].group)
    engine = _engine(checkpoint, engine_config, single.shapes(records, size))
    made = []
    for record, path in single.generate(engine, records, size, output, image, checkpoint.name):
        text = {"text_tokens": tokens, "text_length": text_length, "truncated": record.truncated}
        made.append({"file_name": str(path), **record_settings(record), **text})
        if not as_json:
            click.echo(str(path))
    if as_json:
        click.echo(json.dumps({"model": checkpoint.name, "images": made}, ensure_ascii=False))


@cli.command()
@click.argument("input", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="The job's directory.  [default: out/INPUT]",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file with any of these options; the command line wins.",
)
@_batch_size
@click.option("--limit", type=click.IntRange(0), help="Use the first N rows only.")
@_format_options
@click.option("--dry-run", is_flag=True, help="Show the plan; make nothing.")
@click.option("--strict", is_flag=True, help="Stop before any work if a row is bad.")
@click.option("--max-failures", type=click.IntRange(0), metavar="N", help="Stop when more than N rows failed.")
@click.option(
    "--retry-failed/--no-retry-failed", default=True, show_default=True, help="Try rows again that failed before."
)
@click.option("--force", is_flag=True, help="If the directory holds another job, start over in a new one beside it.")
@_row_options
@_engine_options
@_json
@_verbosity
@click.pass_context
def batch(
    ctx: click.Context,
    /,
    input: str,
    output: Path | None,
    format: str,
    quality: int,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a job: every row of INPUT (.jsonl, .txt, .csv, .tsv, or - for JSONL on stdin) becomes an image.

    The same command again finishes what is missing.
    """
    from fluxcli.engine.runtime import device
    from fluxcli.job.input.read import PromptFile
    from fluxcli.job.job import Job
    from fluxcli.job.report import text as report

    checkpoint, engine_config, defaults = _settings(options)
    options["batch_size"] = _batch_sizes(options["batch_size"], checkpoint, engine_config)
    job = Job(
        input,
        output or Path("out") / ("stdin" if input == "-" else Path(input).stem),
        checkpoint,
        engine_config,
        defaults,
        image=config.ImageFormat(format, quality),
        **{name: options[name] for name in _JOB_OPTIONS},
    )
    if force:
        moved = job.in_free_directory()
        if moved.directory != job.directory:
            say(f"{job.directory} holds another job: starting over in {moved.directory}")
        job = moved
    if dry_run:
        intake, plan = job.preview(PromptFile(input))
        data = report.plan_data(intake, plan)
        if as_json:
            click.echo(json.dumps({"directory": str(job.directory), **data}, ensure_ascii=False))
        else:
            say("\n".join([report.plan_table(data), *report.failure_lines(intake.failures)]))
        return
    make = partial(_engine, checkpoint, engine_config)
    status, totals = job.run(make, device.machine(engine_config), say)
    say(report.totals_lines(totals))
    if totals["failures"]:
        say(f"failed rows: {job.directory / 'failures.jsonl'}")
    if as_json:
        click.echo(json.dumps({"directory": str(job.directory), **totals, "exit_status": status}))
    ctx.exit(status)


@cli.command()
@click.argument("input", type=click.Path(exists=True, dir_okay=False, allow_dash=True), required=False)
@click.option("--size", "sizes", type=_Size(), multiple=True, help="Instead of INPUT; may be given several times.")
@click.option("--export", type=_FILE, help="Write what these shapes need to FILE, for machines like this one.")
@click.option(
    "--import", "import_", type=_FILE, help="Fill the cache from such a FILE, from a source you trust: it holds code."
)
@_batch_size
@_row_options
@_engine_options
@_json
@_verbosity
def warmup(
    input: str | None,
    sizes: Sequence[tuple[int, int]],
    export: Path | None,
    import_: Path | None,
    batch_size: int | str,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile and cache what the shapes of INPUT, or of the given sizes, need.

    A later batch on the same shapes compiles nothing. With --import and neither INPUT nor --size nothing is compiled.
    """
    from fluxcli.core.records import Group, ShapeKey, WarmUp
    from fluxcli.engine.runtime import cache_archive, compile_cache
    from fluxcli.job.input.read import PromptFile
    from fluxcli.job.job import Job
    from fluxcli.job.plan import size_of

    if input is not None and sizes:
        raise click.UsageError("give INPUT or --size, not both")
    checkpoint, engine_config, defaults = _settings(options)
    if export is not None:
        cache_archive.check_export(export)
    if import_ is not None:
        entries = cache_archive.import_(compile_cache.CompileCache(checkpoint, engine_config), import_)
        say(f"{import_}: {entries} entries; cache: {compile_cache.root()}")
        if input is None and not sizes and export is None:
            if as_json:
                click.echo(json.dumps({"imported": entries, "cache": str(compile_cache.root())}))
            return
    lengths = options["text_lengths"]
    sizes_of = _batch_sizes(batch_size, checkpoint, engine_config)
    if input is not None:
        job = Job(input, Path(), checkpoint, engine_config, defaults, lengths, config.ImageFormat(), sizes_of)
        keys = job.whole_plan(PromptFile(input)).shapes()
    else:
        chosen = sizes or [(defaults.width, defaults.height)]
        groups = {Group(height, width, length, 1) for width, height in chosen for length in lengths}
        wanted = [ShapeKey(size_of(sizes_of, group), group.height, group.width, group.text_length) for group in groups]
        keys = sorted(wanted, key=lambda key: (key.tokens(), key), reverse=True)
    start = time.perf_counter()
    engine = _engine(checkpoint, engine_config, keys)

    def tell(one: WarmUp) -> None:
        say(f"{one.key}: {one.seconds:.2f} s, {one.state}, {one.attention} attention")

    shapes = engine.warm_up(keys, tell)
    seconds = time.perf_counter() - start
    say(f"{len(shapes)} shapes in {seconds:.1f} s with the model's loading; cache: {compile_cache.root()}")
    if export is not None:
        size = cache_archive.export(compile_cache.CompileCache(checkpoint, engine_config), export)
        say(f"{export}: {size / 1e6:.1f} MB")
    if as_json:
        rows = [
            {**one.key._asdict(), "seconds": round(one.seconds, 3), "state": one.state, "attention": one.attention}
            for one in shapes
        ]
        click.echo(json.dumps({"shapes": rows, "seconds": round(seconds, 3), "cache": str(compile_cache.root())}))


@cli.command()
@click.option(
    "--size", "sizes", type=_Size(), multiple=True, help="May be given several times.  [default: the model's]"
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=_Numbers("batch sizes", _MOST_IMAGES),
    default=(1, config.BATCH_SIZE),
    help=f"Several may be given.  [default: 1,{config.BATCH_SIZE}]",
)
@click.option(
    "--text-lengths",
    type=_TEXT_LENGTHS,
    default=(config.MAX_TEXT_LENGTH,),
    help=f"In T5 tokens.  [default: {config.MAX_TEXT_LENGTH}, the reference setting]",
)
@click.option("--steps", type=click.IntRange(1, 1000), help="Of a whole image.  [default: the model's]")
@click.option("--vs", type=click.Choice(("diffusers",)), help="Also run this on the same weights: eager and compiled.")
@click.option("--cold-start", is_flag=True, help="Also time two new processes: with empty caches, then from the cache.")
@_machine_options
@_json
@_verbosity
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    text_lengths: Sequence[int],
    steps: int | None,
    vs: str | None,
    cold_start: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure this machine: a step against what its products and attention alone take, whole images by stage.

    Exits with 1 if a shape or a peer could not be measured; the rest is told all the same.
    """
    from fluxcli.bench import table
    from fluxcli.bench.bench import Bench
    from fluxcli.core.records import ShapeKey
    from fluxcli.engine.runtime import device
    from fluxcli.job.output import images

    checkpoint = _checkpoint(options["model"], options["revision"])
    engine_config = device.resolve(options["device"], options["dtype"], options["compile"], options["attention"])
    defaults = checkpoint.row_defaults()
    keys = [
        ShapeKey(batch_size, height, width, length)
        for width, height in sizes or [(defaults.width, defaults.height)]
        for batch_size in batch_sizes
        for length in text_lengths
    ]
    run = Bench(
        checkpoint,
        engine_config,
        keys,
        steps or defaults.num_inference_steps,
        defaults.guidance_scale,
        vs,
        cold_start,
    )
    status, result = run.run(
        partial(_engine, checkpoint, engine_config),
        lambda pixels, record: images.encode(pixels, config.ImageFormat(), record, checkpoint.name),
        say,
    )
    say(f"\n{table.text(result)}")
    if as_json:
        click.echo(json.dumps(result))
    ctx.exit(status)


@cli.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repair", is_flag=True, help="Remove what is broken, so that the next run makes it again.")
@click.option("--yes", is_flag=True, help="Repair without asking.")
@_json
@_verbosity
@click.pass_context
def verify(ctx: click.Context, /, directory: Path, repair: bool, yes: bool, as_json: bool) -> None:
    """Re-check the job in DIRECTORY: decode, hash and count every image.

    Exits with 1 if anything is not as the manifest says.
    """
    from fluxcli.job.report import verify as job

    with job.alone(directory) if repair else contextlib.nullcontext():
        verdict = job.verify(directory)
        say(verdict.as_lines())
        if as_json:
            click.echo(json.dumps(verdict.as_data(), ensure_ascii=False))
        if repair and verdict.problems and (yes or click.confirm("Remove all of these?", err=True)):
            job.repair(verdict)
            say("removed; run the job again to make what is missing")
    ctx.exit(1 if verdict.problems else 0)


def say(text: str) -> None:
    """Everything for people goes to stderr; stdout carries results."""
    click.echo(text, err=True)


def _checkpoint(name: str | None, revision: str | None) -> "Checkpoint":
    from fluxcli.models import checkpoints

    if name is None:
        name = os.environ.get("FLUXCLI_MODEL") or None
    if name is None:
        from fluxcli.engine.runtime import device

        if device.has_gpu():
            name = checkpoints.HUB_DEFAULT
            say(f"no --model given: using {name}")
        else:
            name = "tiny"
            say("no --model given and no CUDA GPU here: using the built-in tiny model")
    return checkpoints.resolve(name, revision)


def _engine(checkpoint: "Checkpoint", engine_config: config.EngineConfig, shapes: "Sequence[ShapeKey]") -> Any:
    from fluxcli.engine.engine import Engine

    say(f"loading {checkpoint.name} ({engine_config.dtype}) on {engine_config.device}")
    engine = Engine(checkpoint, engine_config, shapes)
    if engine.memory.visiting_text:
        say("T5 stays on the host and visits the GPU block by block: memory is short")
    return engine


def _batch_sizes(given: int | str, checkpoint: "Checkpoint", engine_config: config.EngineConfig) -> "BatchSize":
    """--batch-size as the planner takes it."""
    if isinstance(given, int):
        return given
    from fluxcli.engine.batching import BatchSizes

    return BatchSizes(checkpoint, engine_config)


def _settings(options: dict[str, Any]) -> tuple["Checkpoint", config.EngineConfig, config.RowDefaults]:
    """What the shared options mean here, every "auto" and default settled."""
    from fluxcli.engine.runtime import device

    checkpoint = _checkpoint(options["model"], options["revision"])
    engine_config = device.resolve(options["device"], options["dtype"], options["compile"], options["attention"])
    return checkpoint, engine_config, _row_defaults(checkpoint, options)


def _row_defaults(checkpoint: "Checkpoint", options: dict[str, Any]) -> config.RowDefaults:
    own = checkpoint.row_defaults()
    given = {
        "width": options["width"],
        "height": options["height"],
        "num_inference_steps": options["steps"],
        "guidance_scale": options["guidance"] if checkpoint.takes_guidance else None,
        "seed": options["seed"],
    }
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def main() -> None:
    cli(prog_name="fluxcli")
