"""What a compiler says of programs for accelerators that are not here."""
