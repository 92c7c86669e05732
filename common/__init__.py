"""Options, files and errors, tokenizers, pictures: what every room stands on."""
