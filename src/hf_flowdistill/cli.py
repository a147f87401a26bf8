# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command `flowdistill`."""

import importlib
import sys

from hf_flowdistill.errors import UserError, exit_on_user_error


COMMANDS = {  # a module of commands/, imported when it is called, since torch and diffusers take seconds
    "inspect": "Print how a pipeline talks to its transformer, or why it cannot be a teacher.",
    "plan": "Tell which ways of training a pipeline fit on given GPUs, and how to run them.",
    "export": "Write a run, a checkpoint or someone else's student as an ordinary diffusers repository.",
    "card": "Write the model card of an exported student again, with an evaluation for instance.",
    "push": "Publish an exported student on the Hub, in one commit.",
    "verify": "Download a repository and compare every file with the Hub's checksum.",
}


@exit_on_user_error
def main(input_args=None):
    words = sys.argv[1:] if input_args is None else list(input_args)
    listed = "".join(f"  {name:<10} {description}\n" for name, description in COMMANDS.items())
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: flowdistill COMMAND ... (see flowdistill COMMAND --help)\n\n{listed}", end="")
    elif words[0] not in COMMANDS:
        raise UserError(f"flowdistill has no command {words[0]}: choose one of {', '.join(COMMANDS)}.")
    else:
        importlib.import_module(f"hf_flowdistill.commands.{words[0]}").main(words[1:])


if __name__ == "__main__":
    main()
