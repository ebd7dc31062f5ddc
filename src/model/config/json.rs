//! Typed access to the fields of a JSON object. Every error names the file and the field.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::model::error::ModelError;

/// A JSON object of a configuration file.
pub(in crate::model) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Values that are read for absent fields.
    defaults: Option<&'a Map<String, Value>>,
    path: &'a Path,
    /// Place of the object in the file, for messages, e.g. `rope_scaling.`. Empty for the whole
    /// file.
    prefix: String,
}

impl<'a> Fields<'a> {
    pub(in crate::model) fn new(json: &'a Value, path: &'a Path) -> Result<Self, ModelError> {
        let map = json
            .as_object()
            .ok_or_else(|| invalid(path, "(whole file)", "not a JSON object"))?;
        Ok(Fields {
            map,
            defaults: None,
            path,
            prefix: String::new(),
        })
    }

    /// Returns the same fields with `defaults` for those that are absent. A null in the file stays
    /// null.
    pub(in crate::model) fn with_defaults<'b>(&self, defaults: &'b Value) -> Fields<'b>
    where
        'a: 'b,
    {
        let (defaults, prefix) = (defaults.as_object(), self.prefix.clone());
        Fields {
            map: self.map,
            defaults,
            path: self.path,
            prefix,
        }
    }

    pub(in crate::model) fn path(&self) -> &Path {
        self.path
    }

    pub(in crate::model) fn invalid(&self, field: &str, reason: impl Into<String>) -> ModelError {
        invalid(self.path, &format!("{}{field}", self.prefix), reason)
    }

    /// Returns true if the field has a default. Families list a default for the fields that only
    /// some config classes have.
    pub(in crate::model) fn has_default(&self, field: &str) -> bool {
        self.defaults
            .is_some_and(|defaults| defaults.contains_key(field))
    }

    /// Returns true if the field is null, or absent and without a default.
    pub(in crate::model) fn is_null(&self, field: &str) -> bool {
        self.get(field).is_none()
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        let stored = self.map.get(field).or_else(|| self.defaults?.get(field));
        stored.filter(|v| !v.is_null())
    }

    fn read<T>(
        &self,
        field: &str,
        kind: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        self.get(field)
            .map(|v| {
                read(v).ok_or_else(|| {
                    self.invalid(field, format!("is {}; must be {kind}", shortened(v)))
                })
            })
            .transpose()
    }

    pub(in crate::model) fn string(&self, field: &str) -> Result<Option<&'a str>, ModelError> {
        self.read(field, "a string", Value::as_str)
    }

    pub(in crate::model) fn flag(&self, field: &str) -> Result<Option<bool>, ModelError> {
        self.read(field, "true or false", Value::as_bool)
    }

    pub(in crate::model) fn number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        self.read(field, "a number", Value::as_f64)
    }

    pub(in crate::model) fn integer(&self, field: &str) -> Result<Option<u64>, ModelError> {
        self.read(field, "a non-negative integer", Value::as_u64)
    }

    pub(in crate::model) fn strings(
        &self,
        field: &str,
    ) -> Result<Option<Vec<&'a str>>, ModelError> {
        self.read(field, "a list of strings", |v| {
            v.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    pub(in crate::model) fn numbers(&self, field: &str) -> Result<Option<Vec<f64>>, ModelError> {
        self.read(field, "a list of numbers", |v| {
            v.as_array()?.iter().map(Value::as_f64).collect()
        })
    }

    pub(in crate::model) fn integers(&self, field: &str) -> Result<Option<Vec<u64>>, ModelError> {
        self.read(field, "a list of non-negative integers", |v| {
            v.as_array()?.iter().map(Value::as_u64).collect()
        })
    }

    /// Reads a required size from 1 to `max`.
    pub(in crate::model) fn size(&self, field: &str, max: usize) -> Result<usize, ModelError> {
        self.optional_size(field, max)?
            .ok_or_else(|| self.invalid(field, "is missing"))
    }

    /// Reads a size from 1 to `max`. Returns `None` if it is null, or absent and without a default.
    pub(in crate::model) fn optional_size(
        &self,
        field: &str,
        max: usize,
    ) -> Result<Option<usize>, ModelError> {
        self.read(field, &format!("an integer from 1 to {max}"), |v| {
            v.as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| (1..=max).contains(n))
        })
    }

    /// Reads a size from 1 to `max`. Null also stands for the default.
    pub(in crate::model) fn size_or_default(
        &self,
        field: &str,
        max: usize,
    ) -> Result<Option<usize>, ModelError> {
        let default = || usize::try_from(self.defaults?.get(field)?.as_u64()?).ok();
        Ok(self.optional_size(field, max)?.or_else(default))
    }

    /// Reads one token id or a list of them. Returns an empty list if the field is absent or null.
    pub(in crate::model) fn token_ids(&self, field: &str) -> Result<Vec<u32>, ModelError> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.read(field, "a token id or a list of them", |v| match v {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    pub(in crate::model) fn object(&self, field: &str) -> Result<Option<Fields<'a>>, ModelError> {
        let map = self.read(field, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields {
            map,
            defaults: None,
            path: self.path,
            prefix: format!("{}{field}.", self.prefix),
        }))
    }
}

/// Makes a [`ModelError::InvalidConfig`] about a field of `path`.
pub(in crate::model) fn invalid(path: &Path, field: &str, reason: impl Into<String>) -> ModelError {
    ModelError::InvalidConfig {
        path: PathBuf::from(path),
        field: field.to_owned(),
        reason: reason.into(),
    }
}

/// Returns a value as text for a message, at most 60 characters of it, so that a hostile file
/// cannot fill the log.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
