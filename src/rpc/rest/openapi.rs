//! The OpenAPI 3.1 document of the REST API, made from the descriptors and their comments.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use prost_reflect::{
    DescriptorPool, EnumDescriptor, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor,
};
use serde_json::{Map, Value, json};

use super::routes::{self, BodyFields, PathPart, Route};
use crate::rpc::canonical;

/// Maximum nesting of messages whose fields are parameters of the query.
const MAX_DEPTH: usize = 4;
const JSON: &str = "application/json";

static DOCUMENT: LazyLock<Result<String, String>> = LazyLock::new(|| {
    let pool = canonical::pool().map_err(|e| e.to_string())?;
    let mut document = build(routes::table()?, pool);
    document.sort_all_objects();
    Ok(document.to_string())
});

/// Returns the document as JSON.
///
/// # Errors
/// Describes the annotation or the descriptor that cannot be used.
pub fn document() -> Result<&'static str, &'static str> {
    DOCUMENT.as_deref().map_err(String::as_str)
}

fn build(table: &[Route], pool: &DescriptorPool) -> Value {
    let mut schemas = SchemaSet {
        comments: Comments::read(pool),
        done: Map::new(),
    };
    let error = pool
        .get_message_by_name("google.rpc.Status")
        .map(|status| schemas.message(&status));
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for route in table {
        let (path, names) = path_of(route);
        let operation = operation(route, &names, error.as_ref(), &mut schemas);
        let verb = route.verb.as_str().to_ascii_lowercase();
        paths.entry(path).or_default().insert(verb, operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Bradley",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Trains language models with Direct Preference Optimization and \
                            scores preference pairs with them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas.done,
        },
    })
}

/// Returns the path of a route with a parameter for each part that varies, and their names.
fn path_of(route: &Route) -> (String, Vec<String>) {
    let (mut path, mut names, mut before) = (String::new(), Vec::new(), "id");
    for part in &route.template.parts {
        path.push('/');
        match part {
            PathPart::Literal(text) => {
                path += text;
                before = text;
            }
            PathPart::Any => {
                // The collection `trainingJobs` has the member `trainingJob`.
                let name = before.strip_suffix('s').unwrap_or(before).to_owned();
                path += &format!("{{{name}}}");
                names.push(name);
            }
        }
    }
    if let Some(verb) = &route.template.custom_verb {
        path += &format!(":{verb}");
    }
    (path, names)
}

fn operation(
    route: &Route,
    path_names: &[String],
    error: Option<&Value>,
    schemas: &mut SchemaSet,
) -> Value {
    let method = &route.method;
    let service = method.parent_service();
    let mut parameters: Vec<Value> = path_names
        .iter()
        .map(|name| {
            json!({
                "name": name,
                "in": "path",
                "required": true,
                "schema": {"type": "string"},
            })
        })
        .collect();
    if !matches!(route.body, BodyFields::All) {
        add_parameters(route, &method.input(), "", schemas, &mut parameters);
    }
    if route.cursor.is_some() {
        parameters.push(json!({
            "name": "Last-Event-ID",
            "in": "header",
            "description": "ID of the last event that the client received. It overrides the \
                            parameter of the query.",
            "schema": {"type": "string"},
        }));
    }
    let answer = schemas.message(&method.output());
    let content = match method.is_server_streaming() {
        true => json!({
            "application/x-ndjson": {"schema": answer},
            "text/event-stream": {"schema": {
                "type": "string",
                "description": "Server-sent events. The data of each is the JSON of the schema \
                                of application/x-ndjson.",
            }},
        }),
        false => json!({JSON: {"schema": answer}}),
    };
    let mut operation = json!({
        "operationId": format!("{}_{}", service.name(), method.name()),
        "tags": [service.name()],
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {
                "description": "An error.",
                "content": {JSON: {"schema": error.cloned().unwrap_or_else(|| json!({}))}},
            },
        },
    });
    let mut add = |key: &str, value: Value| {
        if let Value::Object(operation) = &mut operation {
            operation.insert(key.to_owned(), value);
        }
    };
    if let Some(comment) = schemas.comments.of(&method.parent_file(), method.path()) {
        add("description", comment.into());
    }
    if !parameters.is_empty() {
        add("parameters", parameters.into());
    }
    let body = match &route.body {
        BodyFields::None => None,
        BodyFields::All => Some(schemas.message(&method.input())),
        BodyFields::One(field) => Some(schemas.kind(&field.kind())),
    };
    if let Some(schema) = body {
        add(
            "requestBody",
            json!({"content": {JSON: {"schema": schema}}}),
        );
    }
    operation
}

/// Adds a parameter of the query for each field that is neither in the path nor in the body.
fn add_parameters(
    route: &Route,
    message: &MessageDescriptor,
    path: &str,
    schemas: &mut SchemaSet,
    all: &mut Vec<Value>,
) {
    for field in message.fields() {
        let (name, path_by_name) = match path {
            "" => (field.json_name().to_owned(), field.name().to_owned()),
            path => (
                format!("{path}.{}", field.json_name()),
                format!("{path}.{}", field.name()),
            ),
        };
        let is_bound = route
            .template
            .variables
            .iter()
            .any(|v| v.field == path_by_name);
        let is_body = matches!(&route.body, BodyFields::One(body) if body.name() == path_by_name);
        if is_bound || is_body || field.is_map() {
            continue;
        }
        if let Kind::Message(inner) = field.kind() {
            let is_text = well_known(&inner).is_some_and(|schema| schema["type"] != "object");
            if !is_text {
                let depth = name.matches('.').count();
                if !field.is_list() && well_known(&inner).is_none() && depth < MAX_DEPTH {
                    add_parameters(route, &inner, &name, schemas, all);
                }
                continue;
            }
        }
        let mut parameter = json!({"name": name, "in": "query", "schema": schemas.field(&field)});
        let comment = schemas
            .comments
            .of(&field.parent_message().parent_file(), field.path());
        if let (Some(comment), Value::Object(parameter)) = (comment, &mut parameter) {
            parameter.insert("description".to_owned(), comment.into());
        }
        all.push(parameter);
    }
}

/// The schemas of all messages and enums that were asked for.
struct SchemaSet {
    comments: Comments,
    done: Map<String, Value>,
}

impl SchemaSet {
    /// Returns a schema or a reference to it.
    fn message(&mut self, message: &MessageDescriptor) -> Value {
        if let Some(schema) = well_known(message) {
            return schema;
        }
        let name = message.full_name();
        if !self.done.contains_key(name) {
            // The entry exists before the fields are read, so that a recursive message ends.
            self.done.insert(name.to_owned(), Value::Null);
            let mut properties = Map::new();
            for field in message.fields() {
                let mut schema = self.field(&field);
                let comment = self.comments.of(&message.parent_file(), field.path());
                if let (Some(comment), Value::Object(schema)) = (comment, &mut schema) {
                    schema.insert("description".to_owned(), comment.into());
                }
                properties.insert(field.json_name().to_owned(), schema);
            }
            let mut schema = json!({"type": "object", "properties": properties});
            let comment = self.comments.of(&message.parent_file(), message.path());
            if let (Some(comment), Value::Object(schema)) = (comment, &mut schema) {
                schema.insert("description".to_owned(), comment.into());
            }
            self.done.insert(name.to_owned(), schema);
        }
        reference(name)
    }

    fn enumeration(&mut self, values: &EnumDescriptor) -> Value {
        let name = values.full_name();
        if !self.done.contains_key(name) {
            let names: Vec<String> = values.values().map(|v| v.name().to_owned()).collect();
            let mut schema = json!({"type": "string", "enum": names});
            let mut text = self
                .comments
                .of(&values.parent_file(), values.path())
                .map(str::to_owned)
                .unwrap_or_default();
            for value in values.values() {
                let comment = self.comments.of(&values.parent_file(), value.path());
                if let Some(comment) = comment {
                    text += &format!("\n- `{}`: {comment}", value.name());
                }
            }
            if let (false, Value::Object(schema)) = (text.is_empty(), &mut schema) {
                schema.insert("description".to_owned(), text.trim_start().into());
            }
            self.done.insert(name.to_owned(), schema);
        }
        reference(name)
    }

    fn field(&mut self, field: &FieldDescriptor) -> Value {
        match field.kind() {
            Kind::Message(entry) if field.is_map() => {
                let value = self.kind(&entry.map_entry_value_field().kind());
                json!({"type": "object", "additionalProperties": value})
            }
            kind if field.is_list() => json!({"type": "array", "items": self.kind(&kind)}),
            kind => self.kind(&kind),
        }
    }

    fn kind(&mut self, kind: &Kind) -> Value {
        match kind {
            Kind::Message(message) => self.message(message),
            Kind::Enum(values) => self.enumeration(values),
            Kind::Bool => json!({"type": "boolean"}),
            Kind::String => json!({"type": "string"}),
            Kind::Bytes => json!({"type": "string", "contentEncoding": "base64"}),
            // NaN and the infinities are strings.
            Kind::Double => json!({"type": ["number", "string"], "format": "double"}),
            Kind::Float => json!({"type": ["number", "string"], "format": "float"}),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
                json!({"type": "integer", "format": "int32"})
            }
            Kind::Uint32 | Kind::Fixed32 => json!({"type": "integer", "minimum": 0}),
            // Answers have strings, and requests may also have numbers.
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                json!({"type": ["string", "integer"], "format": "int64"})
            }
            Kind::Uint64 | Kind::Fixed64 => {
                json!({"type": ["string", "integer"], "format": "uint64"})
            }
        }
    }
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// Returns the schema of one of protobuf's own types, whose JSON is not an object of their fields.
fn well_known(message: &MessageDescriptor) -> Option<Value> {
    let name = message.full_name().strip_prefix("google.protobuf.")?;
    Some(match name {
        "Timestamp" => json!({"type": "string", "format": "date-time"}),
        "Duration" => json!({"type": "string", "pattern": r"^-?\d+(\.\d{1,9})?s$"}),
        "FieldMask" | "StringValue" => json!({"type": "string"}),
        "BytesValue" => json!({"type": "string", "contentEncoding": "base64"}),
        "BoolValue" => json!({"type": "boolean"}),
        "DoubleValue" | "FloatValue" => json!({"type": ["number", "string"]}),
        "Int32Value" | "UInt32Value" => json!({"type": "integer"}),
        "Int64Value" | "UInt64Value" => json!({"type": ["string", "integer"]}),
        "Struct" | "Empty" => json!({"type": "object"}),
        "Any" => json!({
            "type": "object",
            "properties": {"@type": {"type": "string"}},
            "required": ["@type"],
        }),
        "ListValue" => json!({"type": "array", "items": {}}),
        _ => json!({}),
    })
}

/// The comments of the proto files, by file and path of descriptors.
struct Comments(HashMap<(String, Vec<i32>), String>);

impl Comments {
    fn read(pool: &DescriptorPool) -> Self {
        let mut all = HashMap::new();
        for file in pool.files() {
            let source = file.file_descriptor_proto().source_code_info.clone();
            for location in source.into_iter().flat_map(|s| s.location) {
                let text = location.leading_comments().trim();
                if !text.is_empty() {
                    let lines: Vec<&str> = text.lines().map(str::trim).collect();
                    all.insert(
                        (file.name().to_owned(), location.path.clone()),
                        lines.join("\n"),
                    );
                }
            }
        }
        Comments(all)
    }

    fn of(&self, file: &FileDescriptor, path: &[i32]) -> Option<&str> {
        let key = (file.name().to_owned(), path.to_vec());
        self.0.get(&key).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_and_every_schema_has_a_description() {
        let document: Value = serde_json::from_str(document().unwrap()).unwrap();
        let paths = document["paths"].as_object().unwrap();
        let operations: usize = paths.values().map(|p| p.as_object().unwrap().len()).sum();
        assert_eq!(operations, routes::table().unwrap().len());
        for (path, item) in paths {
            for (verb, operation) in item.as_object().unwrap() {
                assert!(operation["description"].is_string(), "{verb} {path}");
            }
        }
        let schemas = document["components"]["schemas"].as_object().unwrap();
        assert!(schemas.len() > 30, "only {}", schemas.len());
        for (name, schema) in schemas
            .iter()
            .filter(|(name, _)| name.starts_with("bradley"))
        {
            assert!(schema["description"].is_string(), "{name}");
        }
    }

    #[test]
    fn a_path_has_a_parameter_for_each_part_that_varies() {
        let document: Value = serde_json::from_str(document().unwrap()).unwrap();
        let path = "/v1/trainingJobs/{trainingJob}/events:stream";
        let stream = &document["paths"][path]["get"];
        let names: Vec<&str> = stream["parameters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["name"].as_str().unwrap())
            .collect();
        assert_eq!(
            names,
            ["trainingJob", "afterSequence", "tail", "Last-Event-ID"]
        );
        let update = &document["paths"]["/v1/trainingJobs/{trainingJob}"]["patch"];
        assert_eq!(update["parameters"][1]["name"], "updateMask");
        let schema = &update["requestBody"]["content"][JSON]["schema"];
        assert_eq!(*schema, reference("bradley.v1.TrainingJob"));
    }
}
