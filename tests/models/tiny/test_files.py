"""What ships of the built-in model: small files that name no machine."""

from safetensors import safe_open

from fluxcli.models.checkpoints import BUILT_IN

DIRECTORY = BUILT_IN / "tiny"


def test_weights_are_small_and_half_precision() -> None:
    files = list(DIRECTORY.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    for path in files:
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}, path  # noqa: SIM118


def test_configs_name_no_machine_and_no_release() -> None:
    for path in DIRECTORY.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text and "_version" not in text, path
