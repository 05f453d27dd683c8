"""Post-training by the flags and files of Primus, run by Megatron Bridge."""
