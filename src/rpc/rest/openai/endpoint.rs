//! The methods of OpenAI's API that are served.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use tonic::codegen::http::Method;

/// A method of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Lists the base models.
    Models,
    /// Returns the base model with this ID.
    Model(String),
    /// Continues a chat.
    Chat,
    /// Continues a text.
    Text,
}

impl Endpoint {
    /// Returns the method with a path behind [`PREFIX`](super::PREFIX); `None` if there is none.
    pub fn find(path: &str) -> Option<Self> {
        match path {
            "models" => Some(Endpoint::Models),
            "chat/completions" => Some(Endpoint::Chat),
            "completions" => Some(Endpoint::Text),
            path => {
                let id = path.strip_prefix("models/").filter(|id| !id.is_empty())?;
                let id = percent_decode_str(id).decode_utf8().ok()?;
                Some(Endpoint::Model(Cow::into_owned(id)))
            }
        }
    }

    /// Returns the HTTP method.
    pub fn verb(&self) -> Method {
        match self.has_body() {
            true => Method::POST,
            false => Method::GET,
        }
    }

    /// Returns true if a request has a JSON body.
    pub fn has_body(&self) -> bool {
        matches!(self, Endpoint::Chat | Endpoint::Text)
    }

    /// Returns the path of the gRPC method: `/package.Service/Method`.
    pub fn grpc_path(&self) -> &'static str {
        match self {
            Endpoint::Models => "/bradley.v1.ModelService/ListModels",
            Endpoint::Model(_) => "/bradley.v1.ModelService/GetModel",
            Endpoint::Chat | Endpoint::Text => "/bradley.v1.GenerationService/GenerateCompletions",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_methods() {
        for (path, expected) in [
            ("models", Some(Endpoint::Models)),
            ("models/tiny", Some(Endpoint::Model("tiny".into()))),
            ("models/a%20b", Some(Endpoint::Model("a b".into()))),
            ("chat/completions", Some(Endpoint::Chat)),
            ("completions", Some(Endpoint::Text)),
            ("models/", None),
            ("models/%ff", None),
            ("embeddings", None),
            ("", None),
        ] {
            assert_eq!(Endpoint::find(path), expected, "{path}");
        }
    }
}
