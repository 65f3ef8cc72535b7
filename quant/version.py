"""The version, said once: packaging, checkpoints and reports read it here."""

VERSION = "0.1.0"
