"""`python -m llmengine` is the program `llmengine`."""

from llmengine.cli import main

main()
