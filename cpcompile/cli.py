"""The command `cpcompile`: train, explain and verify."""
import typer
app = typer.Typer(name="cpcompile", no_args_is_help=True, add_completion=False)


def main() -> None:
    """Run the command line."""
    app()
