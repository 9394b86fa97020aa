"""Episodes on the disk: committed as they are acknowledged, restored at the next start, checked and recovered by hand."""
