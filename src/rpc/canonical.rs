//! Canonical JSON and YAML of the API's messages, in both directions.
//!
//! The form is protobuf's own JSON mapping, so that other protobuf libraries read it, with these
//! choices: fields have their names of the proto files (`snake_case`); integers of 64 bits are
//! numbers if a double holds them exactly (up to 2^53), else strings; the keys of maps are sorted.
//! YAML has the same keys and values.
//!
//! Reading accepts protobuf's mapping, except numbers of enums that this version does not know and
//! integers in quotes with an exponent (`"1e3"`). It also accepts enum values without their prefix
//! and in lower case (`skip` for `ROW_POLICY_SKIP`). All wrong keys and values are reported
//! together, with their paths.

mod error;
#[cfg(test)]
mod tests;
mod yaml;

use std::sync::LazyLock;

use prost::{Message, Name};
use prost_reflect::{
    DescriptorError, DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind,
    MessageDescriptor, ReflectMessage, SerializeOptions,
};
use serde_json::{Number, Value, json};

pub use self::error::CanonicalError;
use super::pb;
use crate::domain::similar::nearest;
use crate::domain::violation::{Violations, quoted};

/// Largest integer up to which a double holds every integer exactly.
const MAX_EXACT: u64 = 1 << 53;
/// Protobuf's own types, whose JSON is not an object of their fields.
const WELL_KNOWN: &str = "google.protobuf.";

static POOL: LazyLock<Result<DescriptorPool, DescriptorError>> =
    LazyLock::new(|| DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET));

/// A message that has a canonical form: every message of [`pb`].
pub trait Canonical: Message + Name + Default {}

impl<M: Message + Name + Default> Canonical for M {}

/// The fields that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldSelection {
    /// Those that are set, and of fields without presence those that differ from their default.
    Set,
    /// All: a field without a value is null, or its default if it has no presence.
    All,
}

/// Returns a message as a JSON object.
///
/// # Errors
/// [`CanonicalError::Conversion`] if the message has a value that JSON cannot have.
pub fn to_value<M: Canonical>(
    message: &M,
    fields: FieldSelection,
) -> Result<Value, CanonicalError> {
    let descriptor = descriptor::<M>()?;
    let mut dynamic = DynamicMessage::decode(descriptor.clone(), &message.encode_to_vec()[..])
        .map_err(conversion)?;
    drop_unknown_details(&mut dynamic);
    let options = SerializeOptions::new()
        .stringify_64_bit_integers(false)
        .use_proto_field_name(true)
        .skip_default_fields(fields == FieldSelection::Set);
    let mut value = dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(conversion)?;
    tidy_message(&descriptor, &mut value, fields);
    Ok(value)
}

/// Returns a message as YAML.
///
/// # Errors
/// The errors of [`to_value`].
pub fn to_yaml<M: Canonical>(
    message: &M,
    fields: FieldSelection,
) -> Result<String, CanonicalError> {
    yaml::write(&to_value(message, fields)?)
}

/// Returns JSON as YAML, e.g. a list of canonical messages.
///
/// # Errors
/// [`CanonicalError::Conversion`] if YAML cannot have the value.
pub fn yaml_of(value: &Value) -> Result<String, CanonicalError> {
    yaml::write(value)
}

/// Reads a message from a JSON object.
///
/// # Errors
/// [`CanonicalError::Fields`] with every unknown key and every value that does not fit its field.
pub fn from_value<M: Canonical>(value: Value) -> Result<M, CanonicalError> {
    let dynamic = dynamic_from_value(descriptor::<M>()?, value)?;
    dynamic.transcode_to().map_err(conversion)
}

/// Reads a message whose type is known at run time only.
///
/// # Errors
/// The errors of [`from_value`].
pub(super) fn dynamic_from_value(
    descriptor: MessageDescriptor,
    mut value: Value,
) -> Result<DynamicMessage, CanonicalError> {
    let mut wrong = Violations::default();
    check_message(&descriptor, &mut value, "", &mut wrong);
    wrong.into_result().map_err(CanonicalError::Fields)?;
    DynamicMessage::deserialize(descriptor, value).map_err(conversion)
}

/// Returns an encoded message in protobuf's own JSON mapping, in which other libraries and gateways
/// write it: `lowerCamelCase` names, integers of 64 bits as strings, and fields without presence
/// also if they have their default.
///
/// # Errors
/// [`CanonicalError::Conversion`] if the bytes are not the message, or if it has a value that JSON
/// cannot have.
pub(super) fn proto_json(
    descriptor: &MessageDescriptor,
    message: &[u8],
) -> Result<Vec<u8>, CanonicalError> {
    let mut dynamic = DynamicMessage::decode(descriptor.clone(), message).map_err(conversion)?;
    drop_unknown_details(&mut dynamic);
    let options = SerializeOptions::new().skip_default_fields(false);
    let mut text = Vec::with_capacity(2 * message.len());
    dynamic
        .serialize_with_options(&mut serde_json::Serializer::new(&mut text), &options)
        .map_err(conversion)?;
    Ok(text)
}

/// Returns the descriptors of all messages and services of the API.
///
/// # Errors
/// [`CanonicalError::Conversion`] if the descriptors cannot be read.
pub(super) fn pool() -> Result<&'static DescriptorPool, CanonicalError> {
    POOL.as_ref().map_err(conversion)
}

/// Reads a message from JSON.
///
/// # Errors
/// [`CanonicalError::Syntax`] if the text is not JSON; otherwise the errors of [`from_value`].
pub fn from_json<M: Canonical>(text: &str) -> Result<M, CanonicalError> {
    let value = serde_json::from_str(text).map_err(|e| CanonicalError::Syntax {
        format: "JSON",
        reason: e.to_string(),
    })?;
    from_value(value)
}

/// Reads a message from YAML, of which JSON is a part.
///
/// # Errors
/// [`CanonicalError::Syntax`] if the text is not YAML; otherwise the errors of [`from_value`].
pub fn from_yaml<M: Canonical>(text: &str) -> Result<M, CanonicalError> {
    from_value(yaml::read(text)?)
}

/// Reads YAML as JSON, without a message's fields in mind.
///
/// # Errors
/// [`CanonicalError::Syntax`] if the text is not YAML, or has values that JSON cannot have.
pub fn value_of_yaml(text: &str) -> Result<Value, CanonicalError> {
    yaml::read(text)
}

/// Reads the documents of a YAML text as JSON; empty ones are left out.
///
/// # Errors
/// The errors of [`value_of_yaml`].
pub fn values_of_yaml(text: &str) -> Result<Vec<Value>, CanonicalError> {
    yaml::read_all(text)
}

fn conversion(error: impl std::fmt::Display) -> CanonicalError {
    CanonicalError::Conversion(error.to_string())
}

fn descriptor<M: Canonical>() -> Result<MessageDescriptor, CanonicalError> {
    let name = M::full_name();
    pool()?
        .get_message_by_name(&name)
        .ok_or_else(|| conversion(format!("{name} is not part of the API")))
}

/// Removes the details of statuses whose type this version does not know, because they have no JSON
/// form.
fn drop_unknown_details(message: &mut DynamicMessage) {
    use prost_reflect::Value;
    for (_, value) in message.fields_mut() {
        match value {
            Value::Message(inner) => drop_unknown_details(inner),
            Value::List(items) => {
                items.retain(|item| item.as_message().is_none_or(is_readable));
                items
                    .iter_mut()
                    .filter_map(Value::as_message_mut)
                    .for_each(drop_unknown_details);
            }
            Value::Map(entries) => entries
                .values_mut()
                .filter_map(Value::as_message_mut)
                .for_each(drop_unknown_details),
            _ => {}
        }
    }
}

/// Returns true unless the message is an Any with content that cannot be decoded.
fn is_readable(message: &DynamicMessage) -> bool {
    let descriptor = message.descriptor();
    if descriptor.full_name() != "google.protobuf.Any" {
        return true;
    }
    let Ok(any) = message.transcode_to::<prost_types::Any>() else {
        return false;
    };
    any_type(&descriptor, &any.type_url)
        .is_some_and(|inner| DynamicMessage::decode(inner, &any.value[..]).is_ok())
}

/// Returns the type that the URL of an Any names.
fn any_type(any: &MessageDescriptor, type_url: &str) -> Option<MessageDescriptor> {
    let name = type_url.rsplit('/').next()?;
    any.parent_pool().get_message_by_name(name)
}

/// Sorts the keys of maps, turns large integers into strings and, with [`FieldSelection::All`],
/// adds the fields without a value.
fn tidy_message(descriptor: &MessageDescriptor, value: &mut Value, fields: FieldSelection) {
    let Value::Object(object) = value else {
        return;
    };
    if descriptor.full_name() == "google.protobuf.Any" {
        let inner = object.get("@type").and_then(Value::as_str);
        if let Some(inner) = inner.and_then(|url| any_type(descriptor, url)) {
            tidy_message(&inner, value, FieldSelection::Set);
        }
        return;
    }
    if descriptor.full_name().starts_with(WELL_KNOWN) {
        return;
    }
    for field in descriptor.fields() {
        match object.get_mut(field.name()) {
            Some(value) => tidy_field(&field, value, fields),
            None if fields == FieldSelection::All => {
                object.insert(field.name().to_owned(), Value::Null);
            }
            None => {}
        }
    }
}

fn tidy_field(field: &FieldDescriptor, value: &mut Value, fields: FieldSelection) {
    match (field.kind(), value) {
        (Kind::Message(entry), Value::Object(entries)) if field.is_map() => {
            entries.sort_keys();
            let kind = entry.map_entry_value_field().kind();
            entries
                .values_mut()
                .for_each(|value| tidy_one(&kind, value, fields));
        }
        (kind, Value::Array(items)) if field.is_list() => items
            .iter_mut()
            .for_each(|item| tidy_one(&kind, item, fields)),
        (kind, value) => tidy_one(&kind, value, fields),
    }
}

fn tidy_one(kind: &Kind, value: &mut Value, fields: FieldSelection) {
    match kind {
        Kind::Message(inner) => tidy_message(inner, value, fields),
        Kind::Float => {
            // The digits of an f32, not those of the f64 of the same value.
            let short = value.as_f64().map(|x| (x as f32).to_string());
            if let Some(short) = short.and_then(|digits| digits.parse::<f64>().ok()) {
                *value = json!(short);
            }
        }
        _ => {
            let beyond = value.as_u64().is_some_and(|n| n > MAX_EXACT)
                || value.as_i64().is_some_and(|n| n.unsigned_abs() > MAX_EXACT);
            if beyond {
                *value = Value::String(value.to_string());
            }
        }
    }
}

/// Checks a message's JSON, and replaces short enum names in it by full ones.
fn check_message(
    descriptor: &MessageDescriptor,
    value: &mut Value,
    path: &str,
    wrong: &mut Violations,
) {
    if descriptor.full_name().starts_with(WELL_KNOWN) {
        return check_well_known(descriptor, value, path, wrong);
    }
    let Value::Object(object) = value else {
        let at = if path.is_empty() {
            descriptor.name()
        } else {
            path
        };
        return wrong.push(
            at,
            format!(
                "is {}: it must be {}",
                kind_of(value),
                fields_of(descriptor)
            ),
        );
    };
    let mut are_fields_listed = false;
    for (key, value) in object.iter_mut() {
        let at = match path {
            "" => key.clone(),
            path => format!("{path}.{key}"),
        };
        let field = descriptor
            .get_field_by_name(key)
            .or_else(|| descriptor.get_field_by_json_name(key));
        match field {
            Some(field) => check_field(&field, value, &at, wrong),
            // The fields are listed once for all the keys of an object.
            None if are_fields_listed && meant_field(descriptor, key).is_none() => {
                wrong.push(at, "does not exist");
            }
            None => {
                are_fields_listed |= meant_field(descriptor, key).is_none();
                wrong.push(at, unknown_key(descriptor, key, path));
            }
        }
    }
    let is_given = |field: &FieldDescriptor| {
        [field.name(), field.json_name()]
            .into_iter()
            .any(|name| object.get(name).is_some_and(|v| !v.is_null()))
    };
    for oneof in descriptor.oneofs().filter(|o| !o.is_synthetic()) {
        let named: Vec<String> = oneof
            .fields()
            .filter(is_given)
            .map(|f| f.name().to_owned())
            .collect();
        if named.len() > 1 {
            wrong.push(
                if path.is_empty() { oneof.name() } else { path },
                format!("has {}: only one of them is accepted", named.join(" and ")),
            );
        }
    }
}

/// Describes a key that the message does not have, with the one that was meant.
pub(super) fn unknown_key(descriptor: &MessageDescriptor, key: &str, path: &str) -> String {
    match (meant_field(descriptor, key), path) {
        (Some(meant), "") => format!("does not exist: did you mean {meant}?"),
        (Some(meant), path) => format!("does not exist: did you mean {path}.{meant}?"),
        (None, _) => {
            let fields: Vec<FieldDescriptor> = descriptor.fields().collect();
            format!(
                "does not exist: {} has {}",
                descriptor.name(),
                listed(&fields)
            )
        }
    }
}

/// Returns the path of the field that was meant by a key that the message does not have; `None` if
/// no field is similar.
fn meant_field(descriptor: &MessageDescriptor, key: &str) -> Option<String> {
    let fields: Vec<FieldDescriptor> = descriptor.fields().collect();
    // A field of a nested message is often given without that message.
    let nested = fields.iter().find_map(|field| match field.kind() {
        Kind::Message(inner)
            if !field.is_map() && !field.is_list() && inner.get_field_by_name(key).is_some() =>
        {
            Some(format!("{}.{key}", field.name()))
        }
        _ => None,
    });
    nested.or_else(|| nearest(key, fields.iter().map(|f| f.name())).map(str::to_owned))
}

fn listed(fields: &[FieldDescriptor]) -> String {
    let names: Vec<&str> = fields.iter().map(|f| f.name()).collect();
    names.join(", ")
}

fn fields_of(descriptor: &MessageDescriptor) -> String {
    let fields: Vec<FieldDescriptor> = descriptor.fields().collect();
    match fields.is_empty() {
        true => "an empty object: {}".to_owned(),
        false => format!("an object with fields of {}", listed(&fields)),
    }
}

fn check_field(field: &FieldDescriptor, value: &mut Value, path: &str, wrong: &mut Violations) {
    match (field.kind(), value) {
        // Null stands for a field that is not set.
        (_, Value::Null) => {}
        (Kind::Message(entry), Value::Object(entries)) if field.is_map() => {
            let kind = entry.map_entry_value_field().kind();
            for (key, value) in entries.iter_mut() {
                check_one(&kind, value, &format!("{path}.{key}"), wrong);
            }
        }
        (_, value) if field.is_map() => wrong.push(
            path,
            format!(
                "is {}: it must be an object of keys and values",
                kind_of(value)
            ),
        ),
        (kind, Value::Array(items)) if field.is_list() => {
            for (i, item) in items.iter_mut().enumerate() {
                check_one(&kind, item, &format!("{path}[{i}]"), wrong);
            }
        }
        (_, value) if field.is_list() => {
            wrong.push(path, format!("is {}: it must be a list", kind_of(value)));
        }
        (kind, value) => check_one(&kind, value, path, wrong),
    }
}

fn check_one(kind: &Kind, value: &mut Value, path: &str, wrong: &mut Violations) {
    let needed = match kind {
        Kind::Message(descriptor) => return check_message(descriptor, value, path, wrong),
        Kind::Enum(values) => return check_enum(values, value, path, wrong),
        Kind::Double | Kind::Float if is_number(value) => return,
        Kind::Double | Kind::Float => "a number".to_owned(),
        Kind::Bool if value.is_boolean() => return,
        Kind::Bool => "true or false".to_owned(),
        Kind::String if value.is_string() => return,
        Kind::String if value.is_number() || value.is_boolean() => {
            format!("text: write {}", quoted(&value.to_string()))
        }
        Kind::String => "text".to_owned(),
        Kind::Bytes if value.is_string() => return,
        Kind::Bytes => "bytes in base64".to_owned(),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
            match check_integer(value, i32::MIN.into(), i32::MAX.into()) {
                Ok(()) => return,
                Err(needed) => needed,
            }
        }
        Kind::Uint32 | Kind::Fixed32 => match check_integer(value, 0, u32::MAX.into()) {
            Ok(()) => return,
            Err(needed) => needed,
        },
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
            match check_integer(value, i64::MIN.into(), i64::MAX.into()) {
                Ok(()) => return,
                Err(needed) => needed,
            }
        }
        Kind::Uint64 | Kind::Fixed64 => match check_integer(value, 0, u64::MAX.into()) {
            Ok(()) => return,
            Err(needed) => needed,
        },
    };
    wrong.push(path, format!("is {}: it must be {needed}", kind_of(value)));
}

fn is_number(value: &Value) -> bool {
    match value {
        Value::Number(_) => true,
        Value::String(text) => {
            text.parse::<f64>().is_ok() || ["NaN", "Infinity", "-Infinity"].contains(&&text[..])
        }
        _ => false,
    }
}

/// Checks an integer, which may be a number without a fraction or a string of digits. An error says
/// what is accepted.
fn check_integer(value: &Value, min: i128, max: i128) -> Result<(), String> {
    let integer = match value {
        Value::Number(n) => integer(n),
        Value::String(text) => text.parse::<i128>().ok(),
        _ => None,
    };
    match integer {
        Some(n) if (min..=max).contains(&n) => Ok(()),
        _ => Err(format!("a whole number from {min} to {max}")),
    }
}

fn integer(number: &Number) -> Option<i128> {
    let whole = |x: f64| (x.fract() == 0.0 && x.abs() < u64::MAX as f64).then_some(x as i128);
    number
        .as_i64()
        .map(i128::from)
        .or_else(|| number.as_u64().map(i128::from))
        .or_else(|| number.as_f64().and_then(whole))
}

/// Checks an enum's value, and replaces a name without the enum's prefix by the full name.
fn check_enum(values: &EnumDescriptor, value: &mut Value, path: &str, wrong: &mut Violations) {
    let number = value.as_i64().and_then(|n| i32::try_from(n).ok());
    if number.is_some_and(|n| values.get_value(n).is_some()) {
        return;
    }
    let names: Vec<String> = values.values().map(|v| v.name().to_owned()).collect();
    if let Some(given) = value.as_str() {
        // The name of the value 0 is the prefix and UNSPECIFIED.
        let prefix = names
            .first()
            .map_or("", |name| name.trim_end_matches("UNSPECIFIED"));
        let upper = given.to_uppercase();
        let full = names
            .iter()
            .find(|name| **name == upper || name.strip_prefix(prefix) == Some(&upper));
        if let Some(full) = full {
            *value = Value::String(full.clone());
            return;
        }
        let short: Vec<&str> = names
            .iter()
            .filter_map(|name| name.strip_prefix(prefix))
            .collect();
        if let Some(meant) = nearest(given, names.iter().map(String::as_str).chain(short)) {
            return wrong.push(path, format!("is {}: did you mean {meant}?", quoted(given)));
        }
    }
    wrong.push(
        path,
        format!(
            "is {}: it must be one of {}",
            kind_of(value),
            names.join(", ")
        ),
    );
}

/// Checks a value of one of protobuf's own types.
fn check_well_known(
    descriptor: &MessageDescriptor,
    value: &Value,
    path: &str,
    wrong: &mut Violations,
) {
    if let Err(error) = DynamicMessage::deserialize(descriptor.clone(), value.clone()) {
        let needed = match descriptor.name() {
            "Duration" => "a number of seconds such as \"90s\" or \"1.5s\"".to_owned(),
            "Timestamp" => "a time such as \"2026-11-24T10:00:00Z\"".to_owned(),
            "Struct" => "an object".to_owned(),
            _ => format!("a {}: {error}", descriptor.full_name()),
        };
        wrong.push(path, format!("is {}: it must be {needed}", kind_of(value)));
    }
}

/// Describes a value for an error: its kind, with the value itself if it is short.
fn kind_of(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// Relation of a key of a JSON object to the fields of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyMatch {
    /// The key is the name of a field.
    Field,
    /// The key is similar to the name of a field, or names a field of a nested message.
    Misspelt,
    /// The key has nothing to do with the message.
    Unknown,
}

/// Compares a key with the fields of a message.
///
/// # Errors
/// [`CanonicalError::Conversion`] if the API does not have the message.
pub fn match_key<M: Canonical>(key: &str) -> Result<KeyMatch, CanonicalError> {
    let descriptor = descriptor::<M>()?;
    let field = descriptor
        .get_field_by_name(key)
        .or_else(|| descriptor.get_field_by_json_name(key));
    Ok(match (field, meant_field(&descriptor, key)) {
        (Some(_), _) => KeyMatch::Field,
        (None, Some(_)) => KeyMatch::Misspelt,
        (None, None) => KeyMatch::Unknown,
    })
}

/// A field of a message, by its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldPath {
    /// The path, e.g. `dpo.beta`.
    pub path: String,
    /// True if the field has keys of its own, as maps have: `labels.team`.
    pub has_keys: bool,
}

/// Returns the paths of all fields of a message and of the messages in it. Fields of messages in
/// lists are not included.
///
/// # Errors
/// [`CanonicalError::Conversion`] if the API does not have the message.
pub fn field_paths<M: Canonical>() -> Result<Vec<FieldPath>, CanonicalError> {
    /// Maximum nesting of messages. The API's are not recursive.
    const MAX_DEPTH: usize = 8;
    let mut all = Vec::new();
    add_paths(&descriptor::<M>()?, "", MAX_DEPTH, &mut all);
    Ok(all)
}

fn add_paths(descriptor: &MessageDescriptor, prefix: &str, depth: usize, all: &mut Vec<FieldPath>) {
    for field in descriptor.fields() {
        let path = format!("{prefix}{}", field.name());
        let inner = match field.kind() {
            Kind::Message(inner) if !field.is_list() && !field.is_map() => Some(inner),
            _ => None,
        };
        let is_struct = |m: &MessageDescriptor| m.full_name() == "google.protobuf.Struct";
        all.push(FieldPath {
            path: path.clone(),
            has_keys: field.is_map() || inner.as_ref().is_some_and(is_struct),
        });
        match inner {
            Some(inner) if depth > 0 && !inner.full_name().starts_with(WELL_KNOWN) => {
                add_paths(&inner, &format!("{path}."), depth - 1, all);
            }
            _ => {}
        }
    }
}
