import errno
import json

import pytest

from fastbert import files


def test_an_error_names_its_file_and_blames_the_disk_only_where_the_system_does(tmp_path):
    path = tmp_path / "curve.txt"
    with (
        pytest.raises(OSError, match=r"the disk is full: free some space.*; the rest is good") as full,
        files.naming(path, "the rest is good"),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(path)
    with pytest.raises(ConnectionResetError) as other, files.naming(path):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert str(other.value) == f"[Errno {errno.ECONNRESET}] Connection reset by peer: '{path}'"
    with pytest.raises(OSError) as folder:
        files.write(tmp_path, {"good": b"1", "missing/bad": b"2"})
    assert folder.value.filename == str(tmp_path / "missing/bad") and not list(tmp_path.iterdir())
    assert "disk" not in str(folder.value) and "space" not in str(folder.value)


def test_json_is_json(tmp_path):
    assert json.loads(files.json_text({"corpus": tmp_path, "lr": 0.5})) == {"corpus": str(tmp_path), "lr": 0.5}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.json_text({"lr": value})
