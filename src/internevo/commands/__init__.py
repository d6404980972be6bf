"""The sub-commands of ``internevo``, one file each."""
