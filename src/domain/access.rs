//! Who asks, and what they may do.

/// What a token allows. Roles are independent, apart from `Admin`, which includes the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Upload datasets, create jobs and handle one's own.
    Submit,
    /// Score pairs and completions.
    Score,
    /// Everything, and everyone's jobs.
    Admin,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 3] = [Role::Submit, Role::Score, Role::Admin];

    /// The name in the store and in settings.
    pub fn name(self) -> &'static str {
        match self {
            Role::Submit => "submit",
            Role::Score => "score",
            Role::Admin => "admin",
        }
    }

    /// The role of that name.
    pub fn parse(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|r| r.name() == name)
    }
}

/// Who makes a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Whose jobs and datasets are the caller's own.
    pub owner: String,
    /// What the caller may do.
    pub roles: Vec<Role>,
    /// The id of the token that says so; it may be revoked while a call goes on.
    pub token: Option<String>,
}

impl Caller {
    /// Anyone, on a server without authentication; also the server itself.
    pub fn anyone() -> Caller {
        Caller { owner: String::new(), roles: vec![Role::Admin], token: None }
    }

    /// Whether the caller has `role`.
    pub fn may(&self, role: Role) -> bool {
        self.roles.contains(&role) || self.is_admin()
    }

    /// Whether everyone's jobs are the caller's to see.
    pub fn is_admin(&self) -> bool {
        self.roles.contains(&Role::Admin)
    }

    /// Whether something of `owner` is the caller's to see.
    pub fn may_see(&self, owner: &str) -> bool {
        self.is_admin() || self.owner == owner
    }

    /// Whose things a list shows; `None` is everyone's.
    pub fn shown(&self) -> Option<&str> {
        (!self.is_admin()).then_some(self.owner.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_admin_sees_what_others_own() {
        let caller = Caller { owner: "team-a".into(), roles: vec![Role::Submit], token: None };
        assert!(caller.may_see("team-a") && !caller.may_see("team-b") && !caller.may_see(""));
        assert!(
            caller.may(Role::Submit)
                && !caller.may(Role::Score)
                && caller.shown() == Some("team-a")
        );
        let admin = Caller { owner: "ops".into(), roles: vec![Role::Admin], token: None };
        assert!(
            admin.may_see("team-a")
                && Role::ALL.iter().all(|r| admin.may(*r))
                && admin.shown().is_none()
        );
    }
}
