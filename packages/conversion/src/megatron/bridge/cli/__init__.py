"""The command line `megatron-bridge`: its root, and the commands that look at the installation."""
