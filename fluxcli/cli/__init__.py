"""The command line: options in, exit code out. Thin: each command gathers settings and hands them to `fluxcli.job` and
`fluxcli.engine`, which are imported only then, so that --help answers at once."""
