//! Routes of the REST API, read from the `google.api.http` annotations in `proto/`.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::LazyLock;

use percent_encoding::percent_decode_str;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor,
    Value,
};
use tonic::codegen::http::Method;

use crate::rpc::canonical;

/// Name of the option that a method's route is read from.
const HTTP_OPTION: &str = "google.api.http";

static TABLE: LazyLock<Result<Vec<Route>, String>> = LazyLock::new(|| {
    let pool = canonical::pool().map_err(|e| e.to_string())?;
    read(pool)
});

/// Returns the routes of all annotated methods.
///
/// # Errors
/// Describes the annotation that cannot be used.
pub fn table() -> Result<&'static [Route], &'static str> {
    TABLE.as_deref().map_err(String::as_str)
}

/// One HTTP method and path, and the gRPC method that serves it.
#[derive(Debug)]
pub struct Route {
    /// The HTTP method.
    pub verb: Method,
    /// The paths of the route.
    pub template: Template,
    /// The fields of the request that the HTTP body has.
    pub body: BodyFields,
    /// The gRPC method.
    pub method: MethodDescriptor,
    /// Path of the gRPC method: `/package.Service/Method`.
    pub grpc_path: String,
    /// Fields with which a broken stream is resumed; `None` if the method has none.
    pub cursor: Option<Cursor>,
}

/// Fields of a request that the HTTP body has.
#[derive(Debug)]
pub enum BodyFields {
    /// None: there is no body.
    None,
    /// All that are not in the path.
    All,
    /// One field, which is the whole body.
    One(FieldDescriptor),
}

/// Fields with which a broken stream is resumed: the events have a field such as `sequence`, and
/// the request a field `after_sequence` of the same type.
#[derive(Debug)]
pub struct Cursor {
    /// Name of the request's field.
    pub after: String,
    /// The field of an event whose value identifies it.
    pub sequence: FieldDescriptor,
}

/// A part of a path between two slashes.
#[derive(Debug, PartialEq, Eq)]
pub enum PathPart {
    /// This text.
    Literal(String),
    /// Any text that is not empty.
    Any,
}

/// A path template, such as `/v1/{name=trainingJobs/*}:pause`.
#[derive(Debug, PartialEq, Eq)]
pub struct Template {
    /// The parts between slashes.
    pub parts: Vec<PathPart>,
    /// The custom verb behind the last colon.
    pub custom_verb: Option<String>,
    /// The fields that the path has.
    pub variables: Vec<PathVariable>,
}

/// A field of the request whose value is a range of the path's parts.
#[derive(Debug, PartialEq, Eq)]
pub struct PathVariable {
    /// Path of the field, e.g. `training_job.name`.
    pub field: String,
    /// The parts of the path.
    pub parts: Range<usize>,
}

impl Template {
    /// Reads a template; `None` if it is malformed or uses `**`.
    pub fn parse(text: &str) -> Option<Self> {
        let path = text.strip_prefix('/')?;
        let last = path.rfind(['/', '}']).map_or(0, |i| i + 1);
        let (path, custom_verb) = match path[last..].find(':') {
            Some(colon) => (
                &path[..last + colon],
                Some(path[last + colon + 1..].to_owned()),
            ),
            None => (path, None),
        };
        let mut template = Template {
            parts: Vec::new(),
            custom_verb,
            variables: Vec::new(),
        };
        let mut rest = Some(path);
        while let Some(text) = rest {
            let after = match text.strip_prefix('{') {
                Some(variable) => {
                    let (variable, after) = variable.split_once('}')?;
                    let (field, pattern) = variable.split_once('=').unwrap_or((variable, "*"));
                    let start = template.parts.len();
                    for part in pattern.split('/') {
                        template.push(part)?;
                    }
                    template.variables.push(PathVariable {
                        field: field.to_owned(),
                        parts: start..template.parts.len(),
                    });
                    after
                }
                None => {
                    let end = text.find('/').unwrap_or(text.len());
                    template.push(&text[..end])?;
                    &text[end..]
                }
            };
            rest = match after {
                "" => None,
                after => Some(after.strip_prefix('/')?),
            };
        }
        Some(template)
    }

    fn push(&mut self, part: &str) -> Option<()> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._~".contains(c);
        self.parts.push(match part {
            "*" => PathPart::Any,
            "" => return None,
            literal if literal.chars().all(is_plain) => PathPart::Literal(literal.to_owned()),
            _ => return None,
        });
        Some(())
    }

    /// Returns the parts of a path that has the form of the template.
    pub fn match_path<'p>(&self, path: &'p str) -> Option<Vec<&'p str>> {
        let path = path.strip_prefix('/')?;
        let path = match &self.custom_verb {
            Some(verb) => path.strip_suffix(verb.as_str())?.strip_suffix(':')?,
            None => path,
        };
        let parts: Vec<&str> = path.split('/').collect();
        let fits = |(part, text): (&PathPart, &&str)| match part {
            PathPart::Literal(literal) => literal == text,
            PathPart::Any => !text.is_empty(),
        };
        (parts.len() == self.parts.len() && self.parts.iter().zip(&parts).all(fits))
            .then_some(parts)
    }

    /// Returns the fields that the path has, with their values; `None` if a part is no UTF-8.
    pub fn bindings(&self, parts: &[&str]) -> Option<Vec<(String, String)>> {
        let mut all = Vec::new();
        for variable in &self.variables {
            let parts = &parts[variable.parts.clone()];
            let decoded: Option<Vec<Cow<'_, str>>> = parts
                .iter()
                .map(|part| percent_decode_str(part).decode_utf8().ok())
                .collect();
            let mut decoded = decoded?;
            if decoded.len() > 1 {
                // An encoded slash stays encoded, because it would make two parts of one.
                for part in &mut decoded {
                    if part.contains('/') {
                        *part = Cow::Owned(part.replace('/', "%2F"));
                    }
                }
            }
            all.push((variable.field.clone(), decoded.join("/")));
        }
        Some(all)
    }
}

/// Result of looking a request's method and path up.
#[derive(Debug)]
pub enum Lookup<'p> {
    /// The route, and the parts of the path.
    Route(&'static Route, Vec<&'p str>),
    /// The path exists, with these methods only.
    OtherVerbs(Vec<&'static Method>),
    /// There is no such path.
    NoPath,
}

/// Looks up the route of a request.
pub fn find<'p>(table: &'static [Route], verb: &Method, path: &'p str) -> Lookup<'p> {
    let mut matching: Vec<(&'static Route, Vec<&'p str>)> = table
        .iter()
        .filter_map(|route| Some((route, route.template.match_path(path)?)))
        .collect();
    // `x:pause` could also be a name with a colon; the template with the verb wins.
    if matching
        .iter()
        .any(|(r, _)| r.template.custom_verb.is_some())
    {
        matching.retain(|(r, _)| r.template.custom_verb.is_some());
    }
    if matching.is_empty() {
        return Lookup::NoPath;
    }
    match matching.iter().position(|(route, _)| route.verb == *verb) {
        Some(i) => {
            let (route, parts) = matching.swap_remove(i);
            Lookup::Route(route, parts)
        }
        None => Lookup::OtherVerbs(matching.iter().map(|(route, _)| &route.verb).collect()),
    }
}

/// Reads the annotations of all methods that REST can serve: those whose request is one message.
fn read(pool: &DescriptorPool) -> Result<Vec<Route>, String> {
    let option = pool
        .get_extension_by_name(HTTP_OPTION)
        .ok_or_else(|| format!("the descriptors have no {HTTP_OPTION}"))?;
    let mut table = Vec::new();
    for method in pool
        .services()
        .flat_map(|s| s.methods().collect::<Vec<_>>())
    {
        let options = method.options();
        if method.is_client_streaming() || !options.has_extension(&option) {
            continue;
        }
        let rule = options.get_extension(&option);
        let Some(rule) = rule.as_message() else {
            continue;
        };
        let additional = rule.get_field_by_name("additional_bindings");
        let additional = additional.as_ref().and_then(|v| v.as_list());
        let additional = additional.into_iter().flatten();
        let rules = std::iter::once(rule).chain(additional.filter_map(Value::as_message));
        for rule in rules {
            table.push(read_rule(&method, rule)?);
        }
    }
    Ok(table)
}

fn read_rule(method: &MethodDescriptor, rule: &DynamicMessage) -> Result<Route, String> {
    let unusable = |what: &str| format!("{}: the option {HTTP_OPTION} {what}", method.full_name());
    let text = |name: &str| {
        let value = rule.get_field_by_name(name)?;
        Some(value.as_str()?.to_owned()).filter(|text| !text.is_empty())
    };
    let verbs = [
        ("get", Method::GET),
        ("put", Method::PUT),
        ("post", Method::POST),
        ("delete", Method::DELETE),
        ("patch", Method::PATCH),
    ];
    let (path, verb) = verbs
        .into_iter()
        .find_map(|(name, verb)| Some((text(name)?, verb)))
        .ok_or_else(|| unusable("has no method"))?;
    if text("response_body").is_some() {
        return Err(unusable("has a response_body"));
    }
    let template = Template::parse(&path).ok_or_else(|| unusable("has a malformed path"))?;
    for variable in &template.variables {
        let field = field_at(&method.input(), &variable.field);
        if !field.is_some_and(|f| f.kind() == Kind::String && !f.is_list()) {
            return Err(unusable("has a path with a field that is no text"));
        }
    }
    let body = match text("body").as_deref() {
        None => BodyFields::None,
        Some("*") => BodyFields::All,
        Some(name) => {
            let field = method.input().get_field_by_name(name);
            BodyFields::One(field.ok_or_else(|| unusable("has an unknown body"))?)
        }
    };
    Ok(Route {
        verb,
        template,
        body,
        grpc_path: format!("/{}/{}", method.parent_service().full_name(), method.name()),
        cursor: cursor(method),
        method: method.clone(),
    })
}

/// Returns the field at a path of names.
pub fn field_at(message: &MessageDescriptor, path: &str) -> Option<FieldDescriptor> {
    let mut names = path.split('.');
    let mut field = message.get_field_by_name(names.next()?)?;
    for name in names {
        field = field.kind().as_message()?.get_field_by_name(name)?;
    }
    Some(field)
}

fn cursor(method: &MethodDescriptor) -> Option<Cursor> {
    if !method.is_server_streaming() {
        return None;
    }
    method.input().fields().find_map(|after| {
        let name = after.name().strip_prefix("after_")?;
        let sequence = method.output().get_field_by_name(name)?;
        (sequence.kind() == after.kind() && sequence.kind() == Kind::Uint64).then(|| Cursor {
            after: after.name().to_owned(),
            sequence,
        })
    })
}
