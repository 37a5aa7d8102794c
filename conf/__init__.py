"""The configuration groups that `cft` composes."""
