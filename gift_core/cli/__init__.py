"""The command line, one file per verb; a verb's file is imported when the verb is used.

Nothing here imports torch; a verb that needs it imports it when it runs.
"""

from gift_core.cli.group import VerbGroup, main

__all__ = ["VerbGroup", "main"]
