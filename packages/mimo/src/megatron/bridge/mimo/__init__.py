"""Several models, each with its own parallelism, trained as one."""
