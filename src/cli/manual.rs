//! `bradley completions` and `bradley man`: completion scripts and manual pages, made from the
//! definition of the arguments.

use std::path::Path;

use clap_complete::Shell;
use clap_mangen::Man;

use super::failure::{Failure, Outcome};
use super::progress::say;
use super::{help_layout, output};

/// Prints the completion script of a shell.
pub(super) fn completions(shell: Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut help_layout::command(), "bradley", &mut script);
    output::write(&script)
}

/// Writes one manual page per command into the folder `out`; without it, prints the page of
/// `bradley` itself.
pub(super) fn man(out: Option<&Path>) -> Outcome {
    let Some(out) = out else {
        let mut page = Vec::new();
        Man::new(help_layout::command())
            .render(&mut page)
            .map_err(|e| Failure::Failed(e.to_string()))?;
        return output::write(&page);
    };
    let failed = |e: std::io::Error| Failure::Failed(format!("{}: {e}", out.display()));
    std::fs::create_dir_all(out).map_err(failed)?;
    clap_mangen::generate_to(help_layout::command(), out).map_err(failed)?;
    say(&format!(
        "the manual pages are in {}: man {}/bradley.1",
        out.display(),
        out.display()
    ));
    Ok(())
}
