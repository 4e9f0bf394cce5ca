"""Our image tool, in the process of the test."""

from nbdqcow.cli.img import main


def img(*arguments: object) -> None:
    """Run a command; its failure fails the test."""
    assert main([str(argument) for argument in arguments]) == 0
