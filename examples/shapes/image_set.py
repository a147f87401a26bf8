# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write a set of pictures with captions, for the adversarial stage.

    python examples/shapes/image_set.py shapes-images                    # as the teacher has learned to draw
    python examples/shapes/image_set.py shapes-posters --style poster    # the same scenes, drawn in another way

An `imagefolder` of the datasets library: PNG files, and metadata.csv with the columns file_name and text.
"""

import argparse
from pathlib import Path

from hf_flowdistill.errors import UserError, exit_on_user_error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--style", choices=("own", "poster"), default="own", help="default: own")
    parser.add_argument("--images", type=int, default=6000, help="how many (default: 6000)")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes (default: 1)")
    args = parser.parse_args()
    if args.images < 1:
        raise UserError(f"--images is {args.images}: it must be at least 1.")
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UserError(f"{args.folder} is there already: name a new folder.")

    from drawing import write_image_set  # with torch, which takes seconds

    write_image_set(args.folder, args.style, args.images, args.seed)


if __name__ == "__main__":
    exit_on_user_error(main)()
