//! Finds environment variables that look like Bradley's but mean nothing, such as
//! BRADLEY_QUUE_TOKENS.

use std::collections::BTreeMap;

use clap::CommandFactory as _;

use super::args::Cli;
use super::settings::SETTINGS;
use crate::domain::similar::nearest;

/// Prefixes of variables that belong to the tests and the tools of this repository.
const OF_TESTS: [&str; 3] = ["BRADLEY_TEST_", "BRADLEY_CI_", "BRADLEY_FUZZ_"];

/// Logs a warning for each variable whose name begins with `BRADLEY_` and that no setting and no
/// flag has.
pub(super) fn warn_about_unknown(environment: &BTreeMap<String, String>) {
    for remark in remarks(environment) {
        tracing::warn!("{remark}");
    }
}

/// Returns a sentence about each unknown variable.
pub(super) fn remarks(environment: &BTreeMap<String, String>) -> Vec<String> {
    unknown(environment)
        .into_iter()
        .map(|(variable, meant)| {
            let advice = match meant {
                Some(meant) => format!("did you mean {meant}?"),
                None => "bradley serve --help lists the settings".to_owned(),
            };
            format!("the environment variable {variable} is unknown and has no effect: {advice}")
        })
        .collect()
}

/// Returns the unknown variables, each with the known one that is most similar to it.
pub(super) fn unknown(environment: &BTreeMap<String, String>) -> Vec<(&str, Option<String>)> {
    let known = known();
    let is_foreign = |name: &str| {
        OF_TESTS.iter().any(|prefix| name.starts_with(prefix)) || is_service_link(name)
    };
    environment
        .keys()
        .map(String::as_str)
        .filter(|name| name.starts_with("BRADLEY_") && !is_foreign(name))
        .filter(|name| !known.iter().any(|other| other == name))
        .map(|name| {
            (
                name,
                nearest(name, known.iter().map(String::as_str)).map(str::to_owned),
            )
        })
        .collect()
}

/// Returns the variables of the settings and of every command's flags.
fn known() -> Vec<String> {
    let of_settings = SETTINGS
        .iter()
        .map(|(name, ..)| format!("BRADLEY_{}", name.to_uppercase()));
    let mut known: Vec<String> = of_settings.chain(["BRADLEY_CONFIG".to_owned()]).collect();
    let mut commands = vec![Cli::command()];
    while let Some(command) = commands.pop() {
        let variables = command.get_arguments().filter_map(clap::Arg::get_env);
        known.extend(variables.filter_map(|v| Some(v.to_str()?.to_owned())));
        commands.extend(command.get_subcommands().cloned());
    }
    known
}

/// Returns true for the variables that Kubernetes adds for Services whose names begin with
/// `bradley`: `BRADLEY_SERVICE_HOST`, `BRADLEY_PORT_50051_TCP`, `BRADLEY_HEADLESS_PORT`, …
fn is_service_link(name: &str) -> bool {
    ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT"]
        .iter()
        .any(|end| name.ends_with(end))
        || name.contains("_SERVICE_PORT_")
        || name
            .split_once("_PORT_")
            .is_some_and(|(_, rest)| rest.starts_with(|first: char| first.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_variable_is_found_and_others_are_not() {
        let names = [
            "BRADLEY_QUUE_TOKENS",
            "BRADLEY_SOMETHING_ELSE_ALTOGETHER",
            "BRADLEY_DATA_DIR",
            "BRADLEY_CONFIG",
            "BRADLEY_SERVER",
            "BRADLEY_TEST_DEVICE",
            "BRADLEY_SERVICE_HOST",
            "BRADLEY_HEADLESS_SERVICE_PORT_GRPC",
            "BRADLEY_PORT_50051_TCP_ADDR",
            "HOME",
        ];
        let environment = names.map(|name| (name.to_owned(), "1".to_owned())).into();
        assert_eq!(
            unknown(&environment),
            [
                (
                    "BRADLEY_QUUE_TOKENS",
                    Some("BRADLEY_QUEUE_TOKENS".to_owned())
                ),
                ("BRADLEY_SOMETHING_ELSE_ALTOGETHER", None),
            ]
        );
    }

    #[test]
    fn the_variables_of_settings_and_of_flags_are_known() {
        let known = known();
        for name in ["BRADLEY_DEVICE", "BRADLEY_TOKEN", "BRADLEY_TLS_SERVER_CA"] {
            assert!(known.iter().any(|other| other == name), "{name}");
        }
    }
}
