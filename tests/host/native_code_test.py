"""C++ is compiled once, loaded only where this user compiled it, and refused clearly where it cannot be."""

import os

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.host import native_code
from dlrm_jax.host.native_code import built, has_compiler
from dlrm_jax.tables.kernels.build import SCORE

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")


@needs_compiler
def test_a_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = built(SCORE)
    made = path.stat().st_mtime_ns

    assert built(SCORE) == path
    assert path.stat().st_mtime_ns == made
    assert [file.name for file in (tmp_path / "dlrm_jax").iterdir()] == [path.name]
    other = tmp_path / "changed"
    other.mkdir()
    for source in (SCORE, *SCORE.parent.glob("*.h")):
        (other / source.name).write_bytes(source.read_bytes())
    assert built(other / "score.cc") == path
    with (other / "parallel.h").open("a") as header:
        header.write("// changed")
    assert built(other / "score.cc") != path


@needs_compiler
def test_what_is_loaded_is_what_this_user_compiled(tmp_path, monkeypatch):
    """Under a umask of 0 nobody else may write there either; what is cut, changed or planted is compiled anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native_code, "_OPTIONS", ("-O0", *native_code._OPTIONS[1:]))
    before = os.umask(0)
    try:
        path = built(SCORE)
    finally:
        os.umask(before)
    for made in (path, path.parent, path.parent.parent):
        assert made.stat().st_mode & 0o077 == 0, made
    whole = path.read_bytes()
    for other in (whole[: len(whole) // 2], b"", whole[:5000] + b"x" + whole[5001:]):
        path.write_bytes(other)
        assert built(SCORE).read_bytes() == whole
    path.chmod(0o722)  # Anybody may have written it, and its name says nothing: they choose that too.
    when = path.stat().st_mtime_ns
    assert built(SCORE).stat().st_mtime_ns > when

    path.parent.chmod(0o777)
    built(SCORE)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(native_code, "_trusted", lambda: (path.stat().st_uid + 1, path.stat().st_uid + 2))
    with pytest.raises(ConfigError, match=r"is another user's.*set XDG_CACHE_HOME to a directory of your own"):
        built(SCORE)


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"no C\+\+ compiler was found, .* install g\+\+"):
        native_code.compiler()


def test_a_compiler_that_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")

    with pytest.raises(ConfigError, match=r"^false .* could not compile score\.cc"):
        built(SCORE)
    assert not list((tmp_path / "dlrm_jax").iterdir())
