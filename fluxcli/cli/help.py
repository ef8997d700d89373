"""How help looks: a command's options under headings; its examples, exit codes and environment at the end."""

from collections.abc import Mapping

import click

# Heading -> its options, in the order in which they are shown. An option that stands nowhere comes last.
HEADINGS = {
    "Files": "output save format quality",
    "Job": "config append dry_run strict max_failures retry_failed force",
    "Input": "limit input_format prompt_column id_column",
    "Images": "num_images sizes width height steps guidance seed lora negative_prompt true_cfg_scale",
    "Measuring": "vs cold_start worst",
    "Carrying the cache": "export import_ key",
    "Repair": "repair yes complete",
    "Model": "model transformer vae text_encoder text_encoder_2 revision dtype quantization",
    "Speed": "batch_size batch_sizes text_lengths step_cache compile attention",
    "Machine": "device gpus workers ray",
}
OTHER = "Other options"
_NAMES = 26  # columns; a longer name has a line of its own
_HEADING_OF = {name: heading for heading, names in HEADINGS.items() for name in names.split()}


class Command(click.Command):
    """A command whose options stand under `HEADINGS`."""

    def records(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """By heading, each option as it is written and what it does."""
        found: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*HEADINGS, OTHER)}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None:
                found[_HEADING_OF.get(str(option.name), OTHER)].append(record)
        return found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = self.records(ctx)
        wide = min(_NAMES, max(len(name) for records in found.values() for name, _ in records))
        for heading, records in found.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl([(name.ljust(wide), text) for name, text in records], col_max=wide)


def ending(
    *examples: str, exits: Mapping[int | str, str] | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """The end of a command's help, each of its lines as it stands here."""
    parts = ["\n".join(["\b", "Examples:", *(f"  {line}" for line in examples)])]
    for title, table in (("Exit codes:", exits), ("Environment:", environment)):
        if table:
            wide = max(len(str(name)) for name in table)
            lines = (f"  {str(name).ljust(wide)}  {text}" for name, text in table.items())
            parts.append("\n".join(["\b", title, *lines]))
    return "\n\n".join(parts)
