# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Publish an exported student on the Hub, in one commit. What is there already is not sent again."""

from hf_flowdistill.cli import ArgumentParser


def main(input_args):
    parser = ArgumentParser(prog="flowdistill push", description=__doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="a student that the training or `flowdistill export` has written")
    add("--repo_id", required=True, metavar="ID", help="name or organisation/name; made if it is not there")
    add("--private", action="store_true", help="make it private; refuse one that is public")
    add("--revision", metavar="BRANCH", help="branch to push to, made if it is not there, e.g. checkpoint-50000")
    add("--create_pr", action="store_true", help="open a pull request instead")
    add("--commit_message", default="Upload student", metavar="TEXT", help="of the commit")
    add("--hub_token", metavar="TOKEN", help="`hf auth login` or HF_TOKEN keep it off the screen")
    args = parser.parse_args(input_args)
    if args.create_pr and args.revision:
        parser.error("--create_pr is against main: leave out --revision")

    from hf_flowdistill.hub.push import upload_student  # with the Hub's client

    pushed = upload_student(
        args.folder,
        args.repo_id,
        token=args.hub_token,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    told = "1 file" if pushed.changed == 1 else f"{pushed.changed} files"
    told = told if pushed.changed else "everything was there already"
    print(f"{pushed.url} at {pushed.commit[:8]}: {told}")
