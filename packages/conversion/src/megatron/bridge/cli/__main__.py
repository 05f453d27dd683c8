"""`python -m megatron.bridge.cli`: the console script under an interpreter of one's choice, as launchers need it."""

from megatron.bridge.cli.root import main

main()
