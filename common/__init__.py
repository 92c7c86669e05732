"""Options, files and errors, tokenizers: what every room stands on."""
