//! What is wrong with a configuration, for the person who has to mend it.

use std::path::PathBuf;

/// What is wrong with a configuration: where, what stands there, and what could.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{}: {error}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line}: {message}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the parser said.
        message: String,
    },
    /// The file sets something that there isn't.
    #[error("{}:{line}: unknown key `{key}`; did you mean `{nearest}`?", file.display())]
    UnknownKey {
        /// The file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// With its section.
        key: String,
        /// The known key that is most like it, with its section.
        nearest: String,
    },
    /// A value in the file has the wrong type or is out of range.
    #[error("{}:{line}: `{key}` is {value}; expected {expected}", file.display())]
    Value {
        /// The file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// With its section.
        key: String,
        /// As it stands there.
        value: String,
        /// What would do.
        expected: String,
    },
    /// The environment sets something that there isn't.
    #[error("unknown variable {name}; did you mean {nearest}?")]
    UnknownVariable {
        /// The variable.
        name: String,
        /// The known variable that is most like it.
        nearest: String,
    },
    /// A variable has a value that doesn't fit.
    #[error("{name} is {value:?}; expected {expected}")]
    Variable {
        /// The variable.
        name: String,
        /// Its value.
        value: String,
        /// What would do.
        expected: String,
    },
    /// Kubernetes has set `PORT`.
    #[error(
        "PORT is {value:?}, which Kubernetes sets for a Service: set `enableServiceLinks: false` in the pod's spec, \
         or PORT to the number of the port to listen on"
    )]
    ServicePort {
        /// Its value.
        value: String,
    },
    /// Values that fit one by one don't fit together, or not their purpose.
    #[error("`{key}` ({variable}) is {value}; expected {expected}")]
    Unfit {
        /// With its section.
        key: &'static str,
        /// The variable that sets it.
        variable: String,
        /// What it is.
        value: String,
        /// What would do.
        expected: String,
    },
}

/// What a deserializer expected, in plain words, from its message.
pub(super) fn expected(message: &str) -> String {
    let message = message.trim_end_matches(|c: char| c.is_whitespace());
    let wanted = message.split_once("expected ").map_or(message, |(_, wanted)| wanted);
    // JSON's messages end with a place that means nothing to a reader of variables.
    let wanted = wanted.split(" at line ").next().unwrap_or(wanted);
    match wanted {
        "u16" => format!("a whole number from 0 to {}", u16::MAX),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        "u64" | "usize" => "a whole number, 0 or more".into(),
        "a boolean" => "true or false".into(),
        "path string" => "a path".into(),
        "a sequence" => "a list".into(),
        other if other.starts_with("struct ") => "a table".into(),
        other => other.into(),
    }
}
