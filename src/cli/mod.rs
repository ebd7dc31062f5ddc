//! The command line: arguments, settings, output.
