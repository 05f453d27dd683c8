"""Dataset providers: one file each."""
