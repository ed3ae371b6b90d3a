"""The questions of tools/bench, one module each; every module has `questions(folder, asked)`."""
