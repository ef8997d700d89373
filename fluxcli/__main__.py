"""`fluxcli`, and `python -m fluxcli`: signals are caught before anything large is imported."""

from fluxcli.job.run import signals


def main() -> None:
    signals.install()
    from fluxcli.cli.main import main

    main()


if __name__ == "__main__":
    main()
