//! Where files go unless told otherwise.

use std::path::{Path, PathBuf};

use super::Config;

impl Config {
    /// Where the embedded database and downloaded models are: as configured, else the platform's directory for a
    /// user's data. Not created here.
    pub fn data_dir(&self) -> PathBuf {
        match &self.data_dir {
            Some(directory) => directory.clone(),
            None => default_data_dir(std::env::consts::OS, |name| std::env::var_os(name).map(PathBuf::from)),
        }
    }
}

fn default_data_dir(os: &str, variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    // The XDG specification: relative paths are invalid and count as absent.
    let directory = |name| variable(name).filter(|path| path.is_absolute());
    let home = directory("HOME");
    let base = match os {
        "macos" => home.map(|home| home.join("Library/Application Support")),
        "windows" => variable("LOCALAPPDATA"),
        _ => directory("XDG_DATA_HOME").or(home.map(|home| home.join(".local/share"))),
    };
    // Without a home: a service account.
    base.unwrap_or_else(|| Path::new("/var/lib").to_owned()).join("stoker")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(os: &str, variables: &[(&str, &str)]) -> PathBuf {
        default_data_dir(os, |name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value))
        })
    }

    #[test]
    fn each_platform_has_its_place() {
        let home = ("HOME", "/home/ann");
        assert_eq!(with("linux", &[home, ("XDG_DATA_HOME", "/data")]), Path::new("/data/stoker"));
        assert_eq!(with("linux", &[home]), Path::new("/home/ann/.local/share/stoker"));
        assert_eq!(
            with("linux", &[home, ("XDG_DATA_HOME", "rel")]),
            Path::new("/home/ann/.local/share/stoker")
        );
        assert_eq!(with("linux", &[]), Path::new("/var/lib/stoker"));
        assert_eq!(with("macos", &[home]), Path::new("/home/ann/Library/Application Support/stoker"));
    }

    #[test]
    fn a_configured_directory_goes_first() {
        let config = Config { data_dir: Some("/somewhere".into()), ..Config::default() };
        assert_eq!(config.data_dir(), Path::new("/somewhere"));
    }
}
