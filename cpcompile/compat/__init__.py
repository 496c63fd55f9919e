"""Names of other packages over this runtime, so that scripts written for them run here."""
