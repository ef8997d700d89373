"""A signal that comes while libraries are imported."""

import os
import signal

import pytest

from fluxcli.job.run.runner import Stopped, _stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_an_import_turned_into_another_error_is_a_stop(number: signal.Signals) -> None:
    with pytest.raises(Stopped) as stopped, _stop_on_signals():
        try:
            os.kill(os.getpid(), number)
        except Exception as error:
            raise RuntimeError("failed to import") from error
    assert stopped.value.exit_code == 128 + number


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="failed to import"), _stop_on_signals():
        raise RuntimeError("failed to import")
