//! Commands that do one thing and end, as they are called.

use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

#[path = "../../shared/tests/common/services.rs"]
mod services;

fn stoker(args: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stoker"))
        .args(args)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("the stoker binary runs")
}

/// What a command that ends well prints.
fn printed(args: &[&str], variables: &[(&str, &str)]) -> String {
    let output = stoker(args, variables);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// The one JSON object that a command prints.
fn json_of(args: &[&str], variables: &[(&str, &str)]) -> Value {
    serde_json::from_str(&printed(args, variables)).expect("JSON")
}

#[test]
fn an_empty_variable_for_the_configuration_counts_as_absent() {
    printed(&["model", "list"], &[("STOKER_CONFIG", "")]);
    let missing = stoker(&["model", "list"], &[("STOKER_CONFIG", "/nowhere/stoker.toml")]);
    let err = String::from_utf8_lossy(&missing.stderr);
    assert!(!missing.status.success());
    assert!(err.contains("/nowhere/stoker.toml"), "{err}");
}

#[test]
fn a_pulled_model_is_named_for_people_and_programs() {
    let path = printed(&["model", "pull"], &[]);
    let pulled = json_of(&["model", "pull", "--json"], &[]);
    assert_eq!(pulled["name"], "SmolLM2-135M-Instruct");
    assert_eq!(pulled["path"], path.trim_end());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_says_which_database_it_was_on() {
    let database = services::Database::create_on(&services::configured().postgres_url).await;
    let variables = [("POSTGRES_URL", database.url.as_str())];
    assert_eq!(printed(&["migrate"], &variables), "the schema is up to date\n");
    let migrated = json_of(&["migrate", "--json"], &variables);
    assert_eq!(migrated["schema"], json!("up to date"));
    assert!(migrated["database"].as_str().is_some_and(|url| url.ends_with(&database.name)), "{migrated}");
}
