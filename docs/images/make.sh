#!/bin/sh
# Makes the pictures of the docs anew, from the repository's root, after `make demo`.
# Needs Chromium, and Pillow (which matplotlib brings).
set -eu
work=$(mktemp -d)
sed -n 2p ghoststore-demo/facts_inflected.jsonl > "$work/question.jsonl"
ghoststore build --checkpoint ghoststore-demo/training/checkpoint-700 --data ghoststore-demo/train.jsonl --store "$work/store" --quiet
ghoststore query --store "$work/store" --val-set "$work/question.jsonl" --top-k 3 --tokens --report "$work/report.html" --quiet
chromium --headless --no-sandbox --hide-scrollbars --window-size=1000,1900 --screenshot="$work/page.png" "file://$work/report.html"
python - "$work/page.png" <<'END'
import sys

from PIL import Image

page = Image.open(sys.argv[1])
page.crop((0, 990, 1000, 1503)).quantize(64).save("docs/images/hits.png", optimize=True)
page.crop((0, 240, 1000, 525)).quantize(64).save("docs/images/histogram.png", optimize=True)
END
rm -r "$work"
