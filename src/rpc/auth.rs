//! Authentication. [`Auth`] resolves a call's bearer token to a [`Caller`], checks the role that
//! the method requires, and stores the caller in the request. All of this happens before the
//! message is read.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response, header};
use tower::{Layer, Service as TowerService};

use super::listener::Peer;
use super::status::status;
use crate::domain::access::{Caller, Role};
use crate::service::audit::AUDIT;
use crate::service::auth::access::require;
use crate::service::auth::tokens::TokenService;
use crate::service::error::ServiceError;

/// The only method that requires no token, because health probes have none. The method `Watch` of
/// the same service requires one, because it keeps a stream open.
pub(super) const HEALTH_CHECK_METHOD: &str = "/grpc.health.v1.Health/Check";
/// Maximum number of refusals that are logged per second. Further ones are only counted, so that
/// callers without a token cannot fill the disk.
const MAX_LOGGED_PER_SECOND: u32 = 20;

/// Layer that adds [`Auth`] to a server, with the settings that all calls share.
#[derive(Clone)]
pub(super) struct AuthLayer {
    /// Resolves tokens to callers.
    pub authenticator: TokenService,
    /// True if callers need a token.
    pub required: bool,
    /// Limits the number of refusals that are logged.
    pub log: Arc<LogRate>,
}

/// Rate limit for log lines: the start of the current second and the number of lines in it; `None`
/// before the first line.
#[derive(Debug, Default)]
pub(super) struct LogRate(Mutex<Option<(Instant, u32)>>);

impl LogRate {
    /// Counts a log line and returns true if it is within the limit of this second.
    pub fn try_log(&self) -> bool {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *window {
            Some((since, n)) if since.elapsed() < Duration::from_secs(1) => {
                *n += 1;
                *n <= MAX_LOGGED_PER_SECOND
            }
            _ => {
                *window = Some((Instant::now(), 1));
                true
            }
        }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth {
            inner,
            layer: self.clone(),
        }
    }
}

/// A service that authenticates its callers.
#[derive(Clone)]
pub(super) struct Auth<S> {
    inner: S,
    layer: AuthLayer,
}

impl<S, B> TowerService<Request<B>> for Auth<S>
where
    S: TowerService<Request<B>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // Only `self.inner` was polled ready, so the call uses it, and `self` keeps the clone.
        let replacement = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, replacement);
        let layer = self.layer.clone();
        Box::pin(async move {
            match admit(&layer, request.uri().path(), request.headers()).await {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    inner.call(request).await
                }
                // Only refusals are counted and logged, not e.g. a database that does not answer.
                Err(e) => {
                    let is_refused = matches!(
                        e,
                        ServiceError::Unauthenticated { .. }
                            | ServiceError::PermissionDenied { .. }
                    );
                    if is_refused {
                        metrics::counter!("bradley_refused_total").increment(1);
                    }
                    if is_refused && layer.log.try_log() {
                        let peer = request
                            .extensions()
                            .get::<Peer>()
                            .map(|p| p.address.to_string());
                        let reason = log_reason(&e);
                        tracing::warn!(target: AUDIT, peer, reason, "refused");
                    }
                    Ok(status(e).into_http())
                }
            }
        })
    }
}

/// Returns the caller of a call, or the reason for which the call is refused.
async fn admit(layer: &AuthLayer, path: &str, headers: &HeaderMap) -> Result<Caller, ServiceError> {
    if !layer.required || path == HEALTH_CHECK_METHOD {
        return Ok(Caller::unrestricted());
    }
    let token = headers
        .get(header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok())
        .and_then(bearer_token);
    let Some(token) = token else {
        let message =
            "this server needs a token: send the metadata \"authorization: Bearer TOKEN\""
                .to_owned();
        return Err(ServiceError::Unauthenticated {
            message,
            log_reason: None,
        });
    };
    let caller = layer.authenticator.admit(token).await?;
    if let Some(role) = required_role(path) {
        require(&caller, role)?;
    }
    Ok(caller)
}

/// Returns the reason of a refusal for the log, which may say more than the answer.
fn log_reason(refusal: &ServiceError) -> String {
    match refusal {
        ServiceError::Unauthenticated {
            log_reason: Some(reason),
            ..
        } => reason.clone(),
        other => other.to_string(),
    }
}

/// Returns the token of an authorization header with the scheme `Bearer`.
fn bearer_token(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Returns the role that a method requires; `None` means any role. Unknown methods require the
/// highest role.
fn required_role(path: &str) -> Option<Role> {
    match path.trim_start_matches('/').split('/').next() {
        Some(
            "bradley.v1.ModelService"
            | "bradley.v1.UsageService"
            | "grpc.health.v1.Health"
            | "grpc.reflection.v1.ServerReflection"
            | "grpc.reflection.v1alpha.ServerReflection",
        ) => None,
        Some(
            "bradley.v1.ScoringService"
            | "bradley.v1.EvaluationService"
            | "bradley.v1.GenerationService",
        ) => Some(Role::Score),
        Some(
            "bradley.v1.TrainingService"
            | "bradley.v1.DatasetService"
            | "bradley.v1.CheckpointService",
        ) => Some(Role::Submit),
        _ => Some(Role::Admin),
    }
}

/// Returns the caller that [`Auth`] stored in the request, and the message.
///
/// # Errors
/// Returns an error if the request did not pass through [`Auth`], so that it has no caller.
pub(super) fn split_caller<T>(request: tonic::Request<T>) -> Result<(Caller, T), tonic::Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    match caller {
        Some(caller) => Ok((caller, request.into_inner())),
        None => Err(status(ServiceError::Unauthenticated {
            message: "the request has no caller".into(),
            log_reason: None,
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::canonical;

    #[test]
    fn every_service_has_its_role() {
        assert_eq!(
            required_role("/bradley.v1.ScoringService/ScorePairs"),
            Some(Role::Score)
        );
        assert_eq!(
            required_role("/bradley.v1.EvaluationService/EvaluatePolicy"),
            Some(Role::Score)
        );
        assert_eq!(
            required_role("/bradley.v1.GenerationService/GenerateCompletions"),
            Some(Role::Score)
        );
        assert_eq!(
            required_role("/bradley.v1.TrainingService/CreateTrainingJob"),
            Some(Role::Submit)
        );
        assert_eq!(required_role("/bradley.v1.ModelService/ListModels"), None);
        assert_eq!(required_role("/bradley.v1.UsageService/GetUsage"), None);
        for service in ["DatasetService", "CheckpointService"] {
            let method = format!("/bradley.v1.{service}/Method");
            assert_eq!(required_role(&method), Some(Role::Submit), "{method}");
        }
        for method in [
            "/grpc.health.v1.Health/Watch",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ] {
            assert_eq!(required_role(method), None, "{method}");
        }
        // A service that nobody has given a role is for administrators only.
        for service in canonical::pool().unwrap().services() {
            let method = format!("/{}/Method", service.full_name());
            assert_ne!(required_role(&method), Some(Role::Admin), "{method}");
        }
        assert_eq!(required_role("/bradley.v1.Unheard/Of"), Some(Role::Admin));
        assert_eq!(
            required_role("bradley.v1.ScoringServiceX/Y"),
            Some(Role::Admin)
        );
    }

    #[test]
    fn a_bearer_is_told_from_other_schemes() {
        assert_eq!(bearer_token("Bearer abc"), Some("abc"));
        assert_eq!(bearer_token("bearer  abc "), Some("abc"));
        assert_eq!(bearer_token("Basic abc"), None);
        assert_eq!(bearer_token("abc"), None);
    }
}
