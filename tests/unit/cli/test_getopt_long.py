import pytest

from nbdqcow.cli.getopt_long import getopt_long
from nbdqcow.errors import UsageError

SHORT = "p:tv"
LONG = {
    "port=": "p",
    "persistent": "t",
    "pid-file=": "pid-file",
    "fork": "fork",
    "verbose": "v",
}


@pytest.mark.parametrize(
    ("arguments", "options", "operands"),
    [
        ([], [], []),
        (["-p", "1"], [("p", "1")], []),
        (["-p1", "-tv"], [("p", "1"), ("t", ""), ("v", "")], []),
        (["-tp", "x", "a"], [("t", ""), ("p", "x")], ["a"]),
        (["--port=1", "--port", "2"], [("p", "1"), ("p", "2")], []),
        (["--po", "1", "--f"], [("p", "1"), ("fork", "")], []),
        (["--pi=x", "--ve"], [("pid-file", "x"), ("v", "")], []),
        (["a", "-t", "b", "--fork"], [("t", ""), ("fork", "")], ["a", "b"]),
        (["-t", "--", "-v", "a"], [("t", "")], ["-v", "a"]),
        (["-", "-t"], [("t", "")], ["-"]),
        (["--port=a=b"], [("p", "a=b")], []),
    ],
)
def test_parsed(monkeypatch, arguments, options, operands):
    monkeypatch.delenv("POSIXLY_CORRECT", raising=False)
    assert getopt_long(arguments, SHORT, LONG) == (options, operands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-x"], "invalid option -- 'x'"),
        (["-tx"], "invalid option -- 'x'"),
        (["a", "-p"], "option requires an argument -- 'p'"),
        (["--bogus"], "unrecognized option '--bogus'"),
        (["--bogus=1"], "unrecognized option '--bogus=1'"),
        (["--port"], "option '--port' requires an argument"),
        (["--po"], "option '--port' requires an argument"),
        (["--fork=1"], "option '--fork' doesn't allow an argument"),
        (["--f=1"], "option '--fork' doesn't allow an argument"),
        (
            ["--p=1"],
            "option '--p=1' is ambiguous; possibilities: "
            "'--port' '--persistent' '--pid-file'",
        ),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(UsageError) as caught:
        getopt_long(arguments, SHORT, LONG)
    assert str(caught.value) == message
