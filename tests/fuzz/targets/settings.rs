//! The server's TOML file.
#![no_main]

use bradley::cli::settings::{Settings, Sources};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(table) = text.parse() {
        let _ = Settings::resolve(&Sources {
            file: Some(("bradley.toml".into(), table)),
            ..Sources::default()
        });
    }
});
