# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Download a repository, if it is not there yet, and compare every file with the Hub's checksum."""

from hf_flowdistill.cli import ArgumentParser, add_origin_arguments


def main(input_args):
    parser = ArgumentParser(prog="flowdistill verify", description=__doc__)
    add = parser.add_argument
    add("repo_id", metavar="REPO", help="organisation/name")
    add_origin_arguments(add)
    add("--local_dir", metavar="DIR", help="compare this folder instead, and download nothing")
    add("--hub_token", metavar="TOKEN", help="`hf auth login` or HF_TOKEN keep it off the screen")
    args = parser.parse_args(input_args)
    if args.local_dir and args.cache_dir:
        parser.error("--local_dir is compared without the cache: leave out --cache_dir")

    from hf_flowdistill.hub.verify import verify_repository  # with the Hub's client

    verified = verify_repository(
        args.repo_id,
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_dir=args.local_dir,
        token=args.hub_token,
    )
    print(
        f"{args.repo_id} at {verified.commit[:8]}: all {verified.files} files are as on the Hub, in {verified.folder}"
    )
