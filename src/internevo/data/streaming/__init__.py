"""Documents that become token ids while training goes on."""
