//! The one configuration loader: a TOML file into a documented struct. Unknown keys are errors,
//! because an option without effect is a defect.

use serde::de::DeserializeOwned;
use std::path::Path;

/// Why a configuration could not be loaded. The message names file, line and key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The text is not what the struct wants.
    #[error("{path}: {source}")]
    Parse {
        /// Which file.
        path: String,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
}

/// Loads `path` into `T`, which should carry `#[serde(deny_unknown_fields)]`.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let shown = || path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: shown(), source })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: shown(), source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[allow(dead_code, reason = "only parsed, to see the other key refused")]
        port: u16,
    }

    #[test]
    fn a_wrong_key_names_the_file_and_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        std::fs::write(&path, "port = 1\nprot = 2\n").unwrap();
        let message = load::<Sample>(&path).unwrap_err().to_string();
        assert!(
            message.contains("node.toml") && message.contains("line 2") && message.contains("prot"),
            "{message}"
        );
        assert!(load::<Sample>(&dir.path().join("absent")).unwrap_err().to_string().contains("absent"));
    }
}
