"""A few random files for each reader; `make fuzz` tries as many as fit into a time."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.readers import READERS

# Values of a wrong type must reach the project's own checks.
pytestmark = pytest.mark.usefixtures("annotations_off")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each reader, with its right files."""
    made = {name: tmp_path_factory.mktemp(name) for name in READERS}
    for name, reader in READERS.items():
        reader.prepare(made[name])
    return made


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_file_is_read_or_refused(folders: dict[str, Path], name: str, data: st.DataObject) -> None:
    READERS[name].example(data, folders[name])
